# CIFAR-10, 32 x 32 colour, red first; downloaded to data/cifar10 by MMPretrain
data_preprocessor = dict(
    num_classes=10, mean=[125.3, 123.0, 113.9], std=[63.0, 62.1, 66.7]
)

# Read by mmpretrain, held on the device; see InMemoryImages
collate_fn = dict(type='mmauxq.collated')
source = dict(type='CIFAR10', data_root='data/cifar10')

train_dataloader = dict(
    batch_size=128,
    num_workers=0,
    dataset=dict(
        type='mmauxq.InMemoryImages',
        dataset=dict(source, split='train'),
        padding=4,
        flip=0.5,
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
