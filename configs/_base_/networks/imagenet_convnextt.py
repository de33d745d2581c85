# Network, data and schedule are mmpretrain's own training of this network,
# unchanged; no schedule of the literature for its quantization is adopted yet.
_base_ = 'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py'

float_checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext/convnext-tiny_32xb128_in1k_20221207-998cf3e9.pth'  # noqa: E501
# the auxiliary module has batch norms; see runtime.py
custom_hooks = [*_base_.custom_hooks, dict(type='SyncBuffersHook')]
