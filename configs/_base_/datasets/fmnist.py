# Fashion-MNIST, 28 x 28 grey; the four unpacked files in data/fashion-mnist
_base_ = './in_memory.py'

data_preprocessor = dict(num_classes=10, mean=[72.94], std=[90.02])

source = dict(
    type='FashionMNIST', data_root='data/fashion-mnist', download=False
)
train_dataloader = dict(dataset=dict(dataset=source, padding=2))
# mmpretrain reads the test files only if test_mode says so, too
val_dataloader = dict(
    dataset=dict(dataset=dict(source, split='test', test_mode=True))
)
test_dataloader = val_dataloader
