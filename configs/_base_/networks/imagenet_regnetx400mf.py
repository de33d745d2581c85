_base_ = [
    'mmpretrain::_base_/models/regnet/regnetx_400mf.py',
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    '../runtime.py',
]

# the checkpoint wants BGR, as in mmpretrain's regnetx-400mf_8xb128_in1k.py
data_preprocessor = dict(
    mean=[103.53, 116.28, 123.675], std=[57.375, 57.12, 58.395], to_rgb=False
)

float_checkpoint = 'https://download.openmmlab.com/mmclassification/v0/regnet/regnetx-400mf_8xb128_in1k_20211213-89bfc226.pth'  # noqa: E501
