# Tiny-ImageNet as its archive unpacks, in data/tiny-imagenet-200
_base_ = './in_memory.py'

data_preprocessor = dict(
    num_classes=200,
    mean=[122.46, 114.26, 101.37],
    std=[70.49, 68.56, 71.81],
    to_rgb=True,
)

source = dict(type='mmauxq.TinyImageNet', data_root='data/tiny-imagenet-200')
train_dataloader = dict(dataset=dict(dataset=source, padding=4))
val_dataloader = dict(dataset=dict(dataset=dict(source, split='val')))
test_dataloader = val_dataloader
