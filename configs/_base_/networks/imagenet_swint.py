# Network, data and schedule are mmpretrain's own training of this network,
# unchanged; no schedule of the literature for its quantization is adopted yet.
_base_ = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'

float_checkpoint = 'https://download.openmmlab.com/mmclassification/v0/swin-transformer/swin_tiny_224_b16x64_300e_imagenet_20210616_090925-66df6be6.pth'  # noqa: E501
