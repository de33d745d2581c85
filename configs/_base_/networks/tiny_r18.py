# ResNet-18 with a 3x3 stem of stride 1, for 64 x 64 pixels
_base_ = ['../datasets/tiny_imagenet.py', '../runtime.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ResNet_CIFAR', depth=18, strides=(2, 2, 2, 2), out_indices=(3,)
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=200,
        in_channels=512,
        loss=dict(type='CrossEntropyLoss'),
    ),
)
input_shape = (3, 64, 64)
