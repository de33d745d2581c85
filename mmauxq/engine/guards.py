"""What every run of this package has: exact loops, and guards."""

from mmengine.config import Config

LOOPS = {
    'EpochBasedTrainLoop': 'mmauxq.EpochLoop',
    'IterBasedTrainLoop': 'mmauxq.IterLoop',
}
GUARDS = ('mmauxq.FiniteNumbersHook', 'mmauxq.QuantizerWatchHook')


def add_guards(cfg: Config) -> None:
    """Add the hooks that watch numbers and quantizers, where not set."""
    hooks = list(cfg.get('custom_hooks') or [])
    there = {h.get('type') for h in hooks if isinstance(h, dict)}
    cfg.custom_hooks = hooks + [
        dict(type=guard) for guard in GUARDS if guard not in there
    ]


def make_exact(cfg: Config) -> None:
    """Choose the loop and the checkpoint hook that resume exactly.

    MMEngine's own are replaced in ``cfg``, as the dumped config shows; those
    of others stay.
    """
    loop = cfg.get('train_cfg')
    if isinstance(loop, dict):
        if 'type' not in loop and 'by_epoch' in loop:
            loop['type'] = (
                'mmauxq.EpochLoop'
                if loop.pop('by_epoch')
                else 'mmauxq.IterLoop'
            )
        else:
            kind = loop.get('type')
            loop['type'] = LOOPS.get(kind, kind)
    hooks = list((cfg.get('default_hooks') or {}).values())
    for hook in hooks + list(cfg.get('custom_hooks') or []):
        if isinstance(hook, dict) and hook.get('type') == 'CheckpointHook':
            hook['type'] = 'mmauxq.SafeCheckpointHook'
