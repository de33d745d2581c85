_base_ = ['../datasets/cifar10.py', '../runtime.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmauxq.CIFARResNet', depth=20, in_channels=3, base_channels=16
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(type='CrossEntropyLoss'),
    ),
)
input_shape = (3, 32, 32)
