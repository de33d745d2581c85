# Fashion-MNIST, 28 x 28 grey; the four unpacked files in data/fashion-mnist
data_preprocessor = dict(num_classes=10, mean=[72.94], std=[90.02])

# Read by mmpretrain, held on the device; see InMemoryImages
collate_fn = dict(type='mmauxq.collated')
source = dict(
    type='FashionMNIST', data_root='data/fashion-mnist', download=False
)

train_dataloader = dict(
    batch_size=256,
    num_workers=0,
    dataset=dict(
        type='mmauxq.InMemoryImages', dataset=source, padding=2, flip=0.5
    ),
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=collate_fn,
)
val_dataloader = dict(
    batch_size=1000,
    num_workers=0,
    dataset=dict(
        type='mmauxq.InMemoryImages',
        # mmpretrain reads the test files only if test_mode says so, too
        dataset=dict(source, split='test', test_mode=True),
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=collate_fn,
)
val_evaluator = dict(type='Accuracy', topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
