# Tiny-ImageNet as its archive unpacks, in data/tiny-imagenet-200
data_preprocessor = dict(
    num_classes=200,
    mean=[122.46, 114.26, 101.37],
    std=[70.49, 68.56, 71.81],
    to_rgb=True,
)

# Read by several processes, held on the device; see InMemoryImages
collate_fn = dict(type='mmauxq.collated')
source = dict(type='mmauxq.TinyImageNet', data_root='data/tiny-imagenet-200')

train_dataloader = dict(
    batch_size=256,
    num_workers=0,
    dataset=dict(
        type='mmauxq.InMemoryImages', dataset=source, padding=4, flip=0.5
    ),
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=collate_fn,
)
val_dataloader = dict(
    batch_size=1000,
    num_workers=0,
    dataset=dict(
        type='mmauxq.InMemoryImages', dataset=dict(source, split='val')
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=collate_fn,
)
val_evaluator = dict(type='Accuracy', topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
