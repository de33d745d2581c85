"""A small runner in this process, for tests of hooks and loops."""

import time

import torch
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmauxq import compat
from tests.networks import batch, joint_qat


class Samples(Dataset):
    """Images in memory, (1, 8, 8), with labels."""

    def __init__(self, count: int = 16) -> None:
        self.images, self.samples = batch(count)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return dict(
            inputs=self.images[index], data_samples=self.samples[index]
        )


def make_runner(
    work_dir, dataset=None, model=None, workers=0, **settings
) -> Runner:
    """Trains for one epoch of 4 steps of 4 images, unless told otherwise."""
    compat.enable()
    loader = dict(
        batch_size=4,
        num_workers=workers,
        dataset=Samples() if dataset is None else dataset,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
    )
    arguments = dict(
        model=joint_qat() if model is None else model,
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(type='mmauxq.EpochLoop', max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        default_hooks=dict(
            checkpoint=dict(type='mmauxq.SafeCheckpointHook', interval=1),
            logger=dict(type='LoggerHook', interval=1),
        ),
        randomness=dict(seed=0),
        default_scope='mmpretrain',
        experiment_name=f'test_{time.time_ns()}',
        log_level='WARNING',
    )
    return Runner(**{**arguments, **settings})


def with_validation(dataset=None, **settings) -> dict:
    """Settings of a runner that validates after each epoch."""
    loader = dict(
        batch_size=8,
        num_workers=0,
        dataset=Samples(8) if dataset is None else dataset,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
    )
    return dict(
        val_dataloader=loader,
        val_cfg=dict(),
        val_evaluator=dict(type='Accuracy', topk=(1,)),
        **settings,
    )


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state of ``model``."""
    return {k: v.clone() for k, v in model.state_dict().items()}
