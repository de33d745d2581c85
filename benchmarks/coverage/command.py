"""A recipe through ``mmauxq train``, on generated images."""

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmpretrain.models import MultiLabelClsHead
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

from mmauxq.algorithms import JointQAT
from mmauxq.cli import train as command
from mmauxq.datasets import GeneratedImages
from mmauxq.engine.running import bare_model
from mmauxq.registry import DATASETS, HOOKS

BATCH = 2
STEPS = 2


class _Ready(Exception):
    """The command has set everything up, and would train ``model``."""

    def __init__(self, model: Any) -> None:
        self.model = model


@HOOKS.register_module()
class EndBeforeTraining(Hook):
    """Ends the command where its set-up is over."""

    priority = 'LOWEST'

    def before_train(self, runner: Any) -> None:
        raise _Ready(bare_model(runner))


@DATASETS.register_module()
class GeneratedLabels(GeneratedImages):
    """Images with a list of labels, for heads that take several."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        label = item['data_samples'].gt_label.item()
        sample = DataSample(
            metainfo=dict(num_classes=self.num_classes)
        ).set_gt_label([label])
        return dict(item, data_samples=sample)


def set_up(cfg: Config, shape: Sequence[int]) -> JointQAT:
    """The model that ``mmauxq train`` would train.

    Args:
        cfg: A recipe.
        shape: (C, H, W) of the images.

    Raises:
        Exception: Whatever the command raises before its first step.
    """
    # long enough for any schedule
    cfg = _with_generated_images(cfg, shape, 1_000_000)
    cfg.custom_hooks = [
        *(cfg.get('custom_hooks') or ()),
        dict(type='mmauxq.EndBeforeTraining'),
    ]
    try:
        _train(cfg)
    except _Ready as ready:
        return ready.model
    raise RuntimeError('the command ended without a step')


def set_up_float(cfg: Config, shape: Sequence[int]) -> None:
    """Let MMPretrain alone set up the training of the float network.

    Args:
        cfg: A recipe.
        shape: (C, H, W) of the images.

    Raises:
        Exception: Whatever MMPretrain raises before its first step.
    """
    cfg = _with_generated_images(cfg, shape, 1_000_000)
    cfg.model = cfg.model.architecture
    cfg.custom_hooks = [dict(type='mmauxq.EndBeforeTraining')]
    build = RUNNERS.build if 'runner_type' in cfg else Runner.from_cfg
    with tempfile.TemporaryDirectory() as cfg.work_dir, suppress(_Ready):
        build(cfg).train()


def train(cfg: Config, shape: Sequence[int]) -> None:
    """Run ``mmauxq train`` for two steps of two images.

    Args:
        cfg: A recipe; its schedule is for more steps and is left out.
        shape: (C, H, W) of the images.

    Raises:
        Exception: Whatever the command raises.
        RuntimeError: If it leaves no ``slim.pth``.
    """
    cfg = _with_generated_images(cfg, shape, STEPS * BATCH)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1)
    cfg.param_scheduler = []
    _train(cfg)


def _with_generated_images(
    cfg: Config, shape: Sequence[int], length: int
) -> Config:
    """A copy of the recipe. One without a schedule, such as that of a backbone
    without a head, gets one."""
    cfg = copy.deepcopy(cfg)
    head = cfg.model.architecture.head
    classes = (cfg.get('data_preprocessor') or {}).get('num_classes', 2)
    several = issubclass(MODELS.get(head.type), MultiLabelClsHead)
    cfg.train_dataloader = dict(
        batch_size=BATCH,
        num_workers=0,
        dataset=dict(
            type='mmauxq.Generated' + ('Labels' if several else 'Images'),
            length=length,
            shape=tuple(shape),
            num_classes=head.get('num_classes', classes),
        ),
        sampler=dict(type='DefaultSampler', shuffle=True),
        collate_fn=dict(type='default_collate'),
    )
    for key in ('val', 'test'):
        for part in ('cfg', 'dataloader', 'evaluator'):
            cfg[f'{key}_{part}'] = None
    cfg.setdefault('train_cfg', dict(by_epoch=True, max_epochs=1))
    cfg.setdefault(
        'optim_wrapper', dict(optimizer=dict(type='AdamW', lr=1e-3))
    )
    cfg.experiment_name = f'generated_{time.time_ns()}'
    return cfg


def _train(cfg: Config) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with tempfile.TemporaryDirectory() as folder:
        file, run = Path(folder, 'recipe.py'), Path(folder, 'run')
        cfg.dump(file)
        words = [str(file), '--work-dir', str(run)]
        command.run(parser.parse_args(words), lambda: None)
        if not (run / 'slim.pth').is_file():
            raise RuntimeError('mmauxq train left no slim.pth')
