"""The three lines of a recipe, on a network that trains in a second.

LeNet ends with a classifier of mmpretrain, as other networks do, and the
files of MNIST are replaced by generated images.
"""

_base_ = ['mmpretrain::lenet/lenet5_mnist.py', 'mmauxq::_base_/aux_w2a2.py']
_base_.model.backbone.num_classes = -1
_base_.model.neck = dict(type='GlobalAveragePooling')
_base_.model.head = dict(type='LinearClsHead', num_classes=10, in_channels=120)
model = dict(
    _delete_=True,
    architecture=_base_.model,
    **_base_.quantization,
)

data = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='mmauxq.GeneratedImages',
        length=128,
        shape=(1, 32, 32),
        num_classes=10,
    ),
)
train_dataloader = val_dataloader = test_dataloader = data
train_cfg = dict(max_epochs=1)
