# CIFAR-10, 32 x 32 colour, red first; downloaded to data/cifar10 by MMPretrain
_base_ = './in_memory.py'

data_preprocessor = dict(
    num_classes=10, mean=[125.3, 123.0, 113.9], std=[63.0, 62.1, 66.7]
)

source = dict(type='CIFAR10', data_root='data/cifar10')
train_dataloader = dict(
    batch_size=128,
    dataset=dict(dataset=dict(source, split='train'), padding=4),
)
# mmpretrain reads the test files only if test_mode says so, too
val_dataloader = dict(
    dataset=dict(dataset=dict(source, split='test', test_mode=True))
)
test_dataloader = val_dataloader
