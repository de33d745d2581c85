"""The runner of the commands that train and test."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch.nn.parallel import DistributedDataParallel

from mmauxq.config_types import type_name
from mmauxq.errors import UsageError
from mmauxq.registry import MODEL_WRAPPERS

from .hooks import DataCheckHook, EpochLengthHook, TeacherCheckHook
from .resumable_loops import check_length


def set_work_dir(cfg: Config, config: str, work_dir: str | None) -> None:
    """Decide on the work directory, and check that it can be written.

    Args:
        cfg: Its ``work_dir`` is set.
        config: Path of its file, which names the directory by default.
        work_dir: What the command line says.

    Raises:
        UsageError: If nothing can be written there.
    """
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(config).stem)
    try:  # it is in the text of the config, and in logs
        os.path.abspath(cfg.work_dir).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f'work dir {os.path.abspath(cfg.work_dir)}: expected a path that '
            'is text in UTF-8; choose another by --work-dir'
        ) from None
    try:
        os.makedirs(cfg.work_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=cfg.work_dir):
            pass
    except OSError as error:
        raise UsageError(
            f'work dir {cfg.work_dir} cannot be written: {error.strerror}'
        ) from error


def build_runner(cfg: Config, mark_running: Callable) -> Runner:
    """Build the runner of a config.

    Args:
        cfg: A complete recipe; its ``launcher`` is ``'none'``, ``'pytorch'``,
            ``'slurm'`` or ``'mpi'``.
        mark_running: Called at the first iteration.
    """
    if cfg.launcher != 'none':
        _set_wrapper(cfg)
        _set_distributed(cfg)
    cfg = RememberedText.of(cfg)
    if 'runner_type' in cfg:
        runner = RUNNERS.build(cfg)
    else:
        runner = Runner.from_cfg(cfg)
    runner.register_hook(DataCheckHook())
    runner.register_hook(_StartHook(mark_running))
    runner.register_hook(TeacherCheckHook())
    runner.register_hook(EpochLengthHook())
    return runner


def _set_distributed(cfg: Config) -> None:
    """Without a GPU: processes on the CPU that talk through gloo.

    MMEngine's ``launcher='pytorch'`` always selects a CUDA device, but it
    leaves a process group alone that exists already.
    """
    if torch.cuda.is_available():
        local, gpus = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
        if cfg.launcher == 'pytorch' and local >= gpus:
            raise UsageError(
                f'process {local} of this machine has no GPU (it has {gpus})'
            )
        return
    if cfg.launcher != 'pytorch':
        raise UsageError(
            f'--launcher {cfg.launcher} needs a GPU; without one, '
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
    wrapper = cfg.model_wrapper_cfg
    kind = MODEL_WRAPPERS.get(type_name(wrapper['type']))
    if isinstance(kind, type) and issubclass(kind, DistributedDataParallel):
        cfg.model_wrapper_cfg = dict(wrapper, device_ids=None)


def _set_wrapper(cfg: Config) -> None:
    """As MMEngine's default, for recorded steps, too."""
    if not cfg.get('model_wrapper_cfg'):
        cfg.model_wrapper_cfg = dict(
            type='mmauxq.RecordedDDP',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )


class RememberedText(Config):
    """A config that is formatted anew only if it changed.

    MMEngine stores the text in each checkpoint, and to format it takes longer
    than all else in saving a small network.
    """

    @classmethod
    def of(cls, cfg: Config) -> 'RememberedText':
        """Holds what ``cfg`` holds."""
        other = cls.__new__(cls)
        vars(other).update(vars(cfg))
        return other

    @property
    def pretty_text(self) -> str:
        content = repr(self.to_dict())
        if content not in _TEXTS:
            _TEXTS.clear()
            _TEXTS[content] = super().pretty_text
        return _TEXTS[content]


_TEXTS: dict[str, str] = {}


class _StartHook(Hook):
    """Tells the command that its set-up is over, as the last of all hooks that
    may object to what they find."""

    priority = 'LOWEST'

    def __init__(self, mark_running: Callable) -> None:
        self.mark_running = mark_running

    def before_train(self, runner: Any) -> None:
        self.mark_running()

    def before_test(self, runner: Any) -> None:
        check_length(runner.test_loop.dataloader, 'test_dataloader')
        self.mark_running()
