"""Loops and hooks that every run of this package has."""

from mmengine.config import Config

LOOPS = {
    'EpochBasedTrainLoop': 'mmauxq.EpochLoop',
    'IterBasedTrainLoop': 'mmauxq.IterLoop',
}
WATCHES = ('mmauxq.FiniteNumbersHook', 'mmauxq.QuantizerWatchHook')


def add_watch_hooks(cfg: Config) -> None:
    """Add the hooks that watch numbers and quantizers, where not set."""
    hooks = list(cfg.get('custom_hooks') or [])
    present = {h.get('type') for h in hooks if isinstance(h, dict)}
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
        elif loop.get('type') in LOOPS:
            loop['type'] = LOOPS[loop['type']]
    hooks = list((cfg.get('default_hooks') or {}).values())
    for hook in hooks + list(cfg.get('custom_hooks') or []):
        if isinstance(hook, dict) and hook.get('type') == 'CheckpointHook':
            hook['type'] = 'mmauxq.SafeCheckpointHook'
