# Network, data and schedule are mmpretrain's own training of this network,
# unchanged; no schedule of the literature for its quantization is adopted yet.
_base_ = 'mmpretrain::deit/deit-small_4xb256_in1k.py'

float_checkpoint = 'https://download.openmmlab.com/mmclassification/v0/deit/deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth'  # noqa: E501
