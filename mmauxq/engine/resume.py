"""Which checkpoint a run goes on from, and how."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor

from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.errors import UsageError
from mmauxq.files import PART
from mmauxq.network.checkpoint import (
    check_architecture,
    check_same_bits,
    normalise,
)
from mmauxq.ranks import rank

from .running import bare_model
from .training_state import Checked, checkpoint_name

GRADIENTS = 'gradients'
"""Entry of a checkpoint for gradients that wait for a step."""


def set_start(cfg: Config, resume: str | None) -> None:
    """Decide where a run begins, and check that the checkpoint is good.

    Args:
        cfg: Its ``resume``, ``load_from`` and seed are set.
        resume: A path, ``'auto'`` for the last good checkpoint in the work
            directory, ``None`` for what the config says.

    Raises:
        UsageError: If the checkpoint that was named cannot be used.
    """
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    if resume is None:
        if cfg.get('load_from') and '://' not in cfg.load_from:
            normalise(read_checkpoint(cfg.load_from), cfg.load_from)
        return
    if resume == 'auto':
        found = find_checkpoint(
            Path(cfg.work_dir), checkpoint_folder(cfg, cfg.work_dir)
        )
    else:
        found = resume, load_resumable(resume)
    if found is None:
        # A float start given by load_from stays: MMEngine's own auto-resume
        # would drop it and train from scratch.
        _warn(f'no checkpoint to resume in {cfg.work_dir}, starting fresh')
        cfg.resume = False
        return
    cfg.load_from, checkpoint = found
    cfg.resume = True
    # with another seed, MMEngine would go on with other data
    seed = checkpoint['meta'].get('seed')
    if type(seed) is int and 0 <= seed < 2**32:
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=seed)


def resume(runner: Any, filename: str, *_: Any, **kwargs: Any) -> None:
    """In the place of MMEngine's ``Runner.resume``: go on from a checkpoint.

    Everything in the file is compared with the model, the optimizer and the
    schedule of the run before any of it is used.

    Args:
        runner: Built, before its first step.
        filename: A training checkpoint.

    Raises:
        UsageError: If it is none, or one of another training.
    """
    checkpoint = load_resumable(filename)
    check = Checked(filename)
    model = bare_model(runner)
    named = dict(model.named_parameters())
    own = model.state_dict()
    for key, value in checkpoint['state_dict'].items():
        check.tensor(f'state_dict.{key}', value, own.get(key, value).shape)
    network = getattr(model, 'architecture', None)
    state = normalise(checkpoint, filename)
    check_architecture(network or model, state, filename)
    ema = checkpoint.get('ema_state_dict', {})
    for key, value in check.mapping('ema_state_dict', ema).items():
        if isinstance(value, Tensor):
            check.tensor(f'ema_state_dict.{key}', value, value.shape)
    check.weights(GRADIENTS, checkpoint.get(GRADIENTS, {}), named)
    if network is not None:
        check_same_bits(network, checkpoint['meta'], filename)
    folder = checkpoint_folder(runner.cfg, runner.work_dir)
    here = Path(filename).absolute().parent == folder.absolute()
    hub = check.message_hub(checkpoint['message_hub'], here)
    wrapper, schedulers = runner.optim_wrapper, runner.param_schedulers
    checkpoint['message_hub'] = hub
    checkpoint['optimizer'] = check.optimizer(wrapper, checkpoint['optimizer'])
    if schedulers is not None:
        states = check.schedulers(
            schedulers, checkpoint.get('param_schedulers')
        )
        checkpoint['param_schedulers'] = states

    # from here on it is believed; hooks may change it
    runner.call_hook('after_load_checkpoint', checkpoint=checkpoint)
    load_state_dict(model, checkpoint['state_dict'], logger=runner.logger)
    runner.train_loop._epoch = checkpoint['meta']['epoch']
    runner.train_loop._iter = checkpoint['meta']['iter']
    runner.message_hub.load_state_dict(checkpoint['message_hub'])
    wrapper.load_state_dict(checkpoint['optimizer'])
    if schedulers is not None:
        _restore(schedulers, checkpoint['param_schedulers'])
    runner._has_loaded = True
    runner.logger.info(f'resumed epoch: {runner.epoch}, iter: {runner.iter}')


def _restore(schedulers: Any, states: Any) -> None:
    if isinstance(schedulers, dict):
        for name, inner in schedulers.items():
            _restore(inner, states[name])
    else:
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(state)


def checkpoint_folder(cfg: Config, work_dir: str | os.PathLike) -> Path:
    """Where the checkpoint hook of a run saves: its work directory, or one of
    the same name in ``default_hooks.checkpoint.out_dir``."""
    work_dir = Path(work_dir)
    hooks = cfg.get('default_hooks') or {}
    out = (hooks.get('checkpoint') or {}).get('out_dir')
    return work_dir if out is None else Path(out, work_dir.name)


def find_checkpoint(
    work_dir: Path, folder: Path | None = None
) -> tuple[str, dict] | None:
    """Path and content of the last good checkpoint of a run.

    That is the one which ``last_checkpoint`` names or, if it is damaged, the
    one of the highest step among the others. Damaged and half-written files
    are named on stderr.

    Args:
        work_dir: Of the run.
        folder: Of its checkpoints; by default the same.
    """
    folder = folder or work_dir
    for part in sorted(folder.glob(f'*{PART}')):
        _warn(f'{part} is incomplete; skipped')
    found = [
        path
        for path in folder.glob('*.pth')
        if re.fullmatch(r'(epoch|iter)_\d{1,12}\.pth', path.name)
        and path.is_file()
    ]
    if found:  # a run counts epochs or iterations; an older one may lie there
        newest = max(found, key=lambda path: path.stat().st_mtime)
        kind = newest.name[0]
        found.sort(key=lambda p: (p.name[0] == kind, _step(p)), reverse=True)
    named = named_checkpoint(work_dir, folder)
    if named is not None:
        found = [named, *(p for p in found if p.name != named.name)]
    for path in found:
        try:
            return str(path), load_resumable(path)
        except UsageError as error:
            _warn(f'{error}; skipped')
    return None


def _step(path: Path) -> int:
    return int(path.stem.rpartition('_')[2])


def named_checkpoint(
    work_dir: Path, folder: Path | None = None
) -> Path | None:
    """The checkpoint in ``folder``, by default the work directory, that
    ``last_checkpoint`` names; folders in that name are not followed."""
    pointer = work_dir / 'last_checkpoint'
    if not pointer.is_file():
        return None
    with open(pointer, 'rb') as file:
        text = os.fsdecode(file.read(4096)).strip()
    name = checkpoint_name(text)
    if name is None:
        _warn(f'{pointer} names no checkpoint; skipped')
        return None
    return (folder or work_dir) / name


def load_resumable(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint that a run can go on from.

    Raises:
        UsageError: If it cannot be read, or is no training checkpoint.
    """
    checkpoint = read_checkpoint(path)
    missing = _what_is_missing(checkpoint)
    if missing:
        raise UsageError(
            f'checkpoint {path}: expected a training checkpoint '
            f'(epoch_N.pth, iter_N.pth), got one that has no {missing}'
        )
    return checkpoint


def _what_is_missing(checkpoint: Any) -> str | None:
    if not isinstance(checkpoint, dict):
        return 'dict at its top'
    for key in ('meta', 'state_dict', 'message_hub', 'optimizer'):
        if not isinstance(checkpoint.get(key), dict):
            return f'dict `{key}`'
    for key in ('epoch', 'iter'):
        value = checkpoint['meta'].get(key)
        if type(value) is not int or not 0 <= value < 2**53:
            return f'number `meta.{key}`'
    for key in ('log_scalars', 'runtime_info', 'resumed_keys'):
        if not isinstance(checkpoint['message_hub'].get(key), dict):
            return f'dict `message_hub.{key}`'
    state = checkpoint['state_dict'].values()
    if not all(isinstance(value, Tensor) for value in state):
        return 'tensors alone in `state_dict`'
    return None


def _warn(message: str) -> None:
    if not rank():
        print(f'warning: {message}', file=sys.stderr, flush=True)
