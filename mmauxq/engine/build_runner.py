"""The runner of the commands that train and test."""

import os
from collections.abc import Callable
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmauxq.errors import UsageError

from .checks import check_samples
from .hooks import EpochLengthHook, TeacherCheckHook


def build_runner(cfg: Config, launcher: str, started: Callable) -> Runner:
    """Build the runner of a config.

    Args:
        cfg: A complete recipe.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.
        started: Called at the first iteration.
    """
    if launcher != 'none':
        _set_distributed(cfg, launcher)
    if 'runner_type' in cfg:
        runner = RUNNERS.build(cfg)
    else:
        runner = Runner.from_cfg(cfg)
    runner.register_hook(_StartMark(started), 'VERY_HIGH')
    runner.register_hook(TeacherCheckHook())
    runner.register_hook(EpochLengthHook())
    return runner


def _set_distributed(cfg: Config, launcher: str) -> None:
    """Without a GPU: processes on the CPU that talk through gloo.

    MMEngine's ``launcher='pytorch'`` always selects a CUDA device, but it
    leaves a process group alone that exists already.
    """
    if torch.cuda.is_available():
        local, gpus = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
        if launcher == 'pytorch' and local >= gpus:
            raise UsageError(
                f'process {local} of this machine has no GPU (it has {gpus})'
            )
        return
    if launcher != 'pytorch':
        raise UsageError(
            f'--launcher {launcher} needs a GPU; without one, '
            'use tools/dist_train.sh'
        )
    if 'RANK' not in os.environ:
        raise UsageError(
            '--launcher pytorch is for torchrun; '
            'use tools/dist_train.sh CONFIG GPUS'
        )
    if cfg.get('sync_bn'):
        raise UsageError('sync_bn needs a GPU; set sync_bn=None')
    torch.distributed.init_process_group('gloo')
    wrapper = cfg.get('model_wrapper_cfg') or dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.model_wrapper_cfg = dict(wrapper, device_ids=None)


class _StartMark(Hook):
    """Tells when set-up is over."""

    def __init__(self, started: Callable) -> None:
        self.started = started

    def before_train(self, runner: Any) -> None:
        check_samples(runner)
        self.started()

    def before_test(self, runner: Any) -> None:
        check_samples(runner)
        self.started()
