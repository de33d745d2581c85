_base_ = ['../datasets/digits.py', '../runtime.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmauxq.CIFARResNet', depth=20, in_channels=1, base_channels=8
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=32,
        loss=dict(type='CrossEntropyLoss'),
    ),
)
input_shape = (1, 8, 8)
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(max_keep_ckpts=-1)
)
