# Any data set of MMPretrain with images of one size, held on the device; a
# config that inherits this says which images, and how they are augmented
train_dataloader = dict(
    batch_size=256,
    num_workers=0,
    dataset=dict(type='mmauxq.InMemoryImages', flip=0.5),
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='mmauxq.collated'),
)
val_dataloader = dict(
    batch_size=1000,
    num_workers=0,
    dataset=dict(type='mmauxq.InMemoryImages'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='mmauxq.collated'),
)
val_evaluator = dict(type='Accuracy', topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
