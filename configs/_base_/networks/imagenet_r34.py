_base_ = [
    'mmpretrain::_base_/models/resnet34.py',
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    '../runtime.py',
]

# mmpretrain's own training of this network, 8 x 32 images
float_checkpoint = 'https://download.openmmlab.com/mmclassification/v0/resnet/resnet34_8xb32_in1k_20210831-f257d4e6.pth'  # noqa: E501
