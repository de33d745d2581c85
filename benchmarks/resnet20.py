_base_ = '../configs/float_r20_fmnist.py'

# generated images have 3 channels and 1000 classes
model = dict(backbone=dict(in_channels=3), head=dict(num_classes=1000))
data_preprocessor = dict(num_classes=1000)
