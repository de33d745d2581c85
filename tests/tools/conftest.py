"""A project of a user: a tiny float classifier on a made-up data set."""

import os
import subprocess
import sys

import pytest

DATASET = """
import torch
from mmpretrain.registry import DATASETS
from mmpretrain.structures import DataSample


@DATASETS.register_module(force=True)
class ToySet(torch.utils.data.Dataset):
    metainfo = dict(classes=('a', 'b', 'c'))

    def __init__(self, fail=False):
        self.fail = fail

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if self.fail:
            raise RuntimeError('the data set broke')
        rng = torch.Generator().manual_seed(i)
        image = torch.randint(
            0, 255, (3, 8, 8), generator=rng, dtype=torch.uint8)
        return dict(
            inputs=image, data_samples=DataSample().set_gt_label(i % 3))
"""

# MMEngine keeps loggers by name, so two runs in one process need two names.
CONFIG = """
import time
experiment_name = f'toy_{time.time_ns()}'
default_scope = 'mmpretrain'
custom_imports = dict(imports=['toyset'])
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='MobileNetV2', widen_factor=0.1, out_indices=(0, )),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=8, topk=(1, )))
data_preprocessor = dict(num_classes=3, mean=[127.] * 3, std=[60.] * 3)
loader = dict(
    batch_size=4, num_workers=0, dataset=dict(type='ToySet'),
    sampler=dict(type='DefaultSampler', shuffle=False))
train_dataloader = loader
val_dataloader = loader
test_dataloader = loader
val_evaluator = dict(type='Accuracy', topk=(1, ))
test_evaluator = val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4))
param_scheduler = dict(type='MultiStepLR', milestones=[3])
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', interval=1),
    logger=dict(type='LoggerHook', interval=1))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty folder with ``config.py`` and the data set it names."""
    (tmp_path / 'toyset.py').write_text(DATASET)
    (tmp_path / 'config.py').write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def tool(root, project):
    """Runs ``tools/NAME`` in a process of its own, from the project."""

    def run(name, *args, **env):
        program = [sys.executable] if name.endswith('.py') else ['bash']
        environment = {
            **os.environ,
            'PYTHON': sys.executable,
            'PYTHONPATH': f'{root}:{project}',
            'OMP_NUM_THREADS': '1',
            **env,
        }
        return subprocess.run(
            [*program, str(root / 'tools' / name), *map(str, args)],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1200,
        )

    return run
