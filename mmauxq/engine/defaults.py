"""Loops, hooks and precision of a run of this package."""

import torch
from mmengine.config import Config

from mmauxq.config_types import type_name

LOOPS = {
    'EpochBasedTrainLoop': 'mmauxq.EpochLoop',
    'IterBasedTrainLoop': 'mmauxq.IterLoop',
}
WATCHES = ('mmauxq.FiniteNumbersHook', 'mmauxq.QuantizerWatchHook')


def apply_defaults(cfg: Config) -> None:
    """Put into a config what every run of this package has."""
    fit_amp(cfg)
    use_resumable_loop(cfg)
    stack_batches(cfg)
    add_watch_hooks(cfg)


def add_watch_hooks(cfg: Config) -> None:
    """Add the hooks that watch numbers and quantizers, where not set."""
    hooks = list(cfg.get('custom_hooks') or [])
    present = {type_name(h.get('type')) for h in hooks if isinstance(h, dict)}
    cfg.custom_hooks = hooks + [
        dict(type=kind) for kind in WATCHES if kind not in present
    ]


def use_resumable_loop(cfg: Config) -> None:
    """Choose the loop and the checkpoint hook that resume exactly.

    MMEngine's own are replaced in ``cfg``, as the dumped config shows; other
    classes stay.
    """
    loop = cfg.get('train_cfg')
    if isinstance(loop, dict):
        if 'type' not in loop and 'by_epoch' in loop:
            by_epoch = loop.pop('by_epoch')
            loop['type'] = f'mmauxq.{"Epoch" if by_epoch else "Iter"}Loop'
        else:
            kind = type_name(loop.get('type'))
            loop['type'] = LOOPS.get(kind, loop.get('type'))
    hooks = list((cfg.get('default_hooks') or {}).values())
    for hook in hooks + list(cfg.get('custom_hooks') or []):
        if not isinstance(hook, dict):
            continue
        if type_name(hook.get('type')) == 'CheckpointHook':
            hook['type'] = 'mmauxq.SafeCheckpointHook'


def stack_batches(cfg: Config) -> None:
    """Let a loader for training send its batches as whole tensors, where no
    ``collate_fn`` is set and the loop is one that takes them."""
    loader = cfg.get('train_dataloader')
    loop = type_name((cfg.get('train_cfg') or {}).get('type'))
    if isinstance(loader, dict) and loop in LOOPS.values():
        loader.setdefault('collate_fn', dict(type='mmauxq.stacked_batch'))


def fit_amp(cfg: Config) -> None:
    """Let MMEngine's ``AmpOptimWrapper`` in a config run on this machine.

    Without a GPU it would refuse to be built.
    """
    section = cfg.get('optim_wrapper') or {}
    if type_name(section.get('type')) != 'AmpOptimWrapper':
        return
    if torch.cuda.is_available():
        # bfloat16 has the range of float32: it needs no scale to keep small
        # gradients, and a scale would skip steps with infinite ones
        bfloat16 = section.get('dtype') in ('bfloat16', torch.bfloat16)
        scale = dict(enabled=False) if bfloat16 else 'dynamic'
        section.setdefault('loss_scale', scale)
    else:
        section.type = 'mmauxq.CPUAmpOptimWrapper'
