"""Which checkpoint a run goes on from."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import Tensor

from mmauxq import compat
from mmauxq.errors import UsageError
from mmauxq.files import PART
from mmauxq.ranks import rank


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
            compat.load_checkpoint(cfg.load_from)
        return
    if resume == 'auto':
        found = find_checkpoint(Path(cfg.work_dir))
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
    if isinstance(seed, int):
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=seed)


def find_checkpoint(work_dir: Path) -> tuple[str, dict] | None:
    """Path and content of the last good checkpoint of a run.

    That is the one which ``last_checkpoint`` names or, if it is damaged, the
    newest other one. Damaged and half-written files are named on stderr.
    """
    for part in sorted(work_dir.glob(f'*{PART}')):
        _warn(f'{part} is incomplete; skipped')
    found = [
        path
        for path in work_dir.glob('*.pth')
        if re.fullmatch(r'(epoch|iter)_\d+\.pth', path.name)
    ]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    named = named_checkpoint(work_dir)
    if named is not None:
        found = [named, *(p for p in found if p.name != named.name)]
    for path in found:
        try:
            return str(path), load_resumable(path)
        except UsageError as error:
            _warn(f'{error}; skipped')
    return None


def named_checkpoint(work_dir: Path) -> Path | None:
    """What ``last_checkpoint`` names, also in a moved work directory."""
    pointer = work_dir / 'last_checkpoint'
    if not pointer.is_file():
        return None
    named = Path(pointer.read_text(errors='replace').strip() or '?')
    moved = work_dir / named.name
    return moved if moved.is_file() and not named.is_file() else named


def load_resumable(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint that a run can go on from.

    Raises:
        UsageError: If it cannot be read, or is no training checkpoint.
    """
    checkpoint = compat.load_checkpoint(path)
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
        if not isinstance(value, int) or value < 0:
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
