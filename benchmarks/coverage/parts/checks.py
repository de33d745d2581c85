"""What a trained project must hold."""

import math
from collections.abc import Callable
from pathlib import Path

from mmauxq.checkpoint_file import read_checkpoint

START = dict(lr=0.01, momentum=0.9, weight_decay=1e-4)
"""Settings of the optimizer of a project, in :mod:`.project`."""


def newest(folder: Path) -> dict:
    """The last checkpoint of a training."""
    name = (folder / 'run' / 'last_checkpoint').read_text().strip()
    return read_checkpoint(str(folder / name))


def checkpoint_has(key: str) -> Callable[[Path], str]:
    """A check that the checkpoint has a key."""
    return lambda folder: (
        '' if key in newest(folder) else f'no {key} in the checkpoint'
    )


def epochs_are(number: int) -> Callable[[Path], str]:
    """A check of the number of epochs that were trained."""

    def check(folder: Path) -> str:
        found = newest(folder)['meta']['epoch']
        if found == number:
            return ''
        return f'expected {number} epochs, got {found}'

    return check


def setting_moved(name: str) -> Callable[[Path], str]:
    """A check that a scheduler moved a setting of the optimizer, and that it
    left the weight decay of scales alone."""

    def check(folder: Path) -> str:
        groups = newest(folder)['optimizer']['param_groups']
        if math.isclose(groups[0][name], START[name], rel_tol=1e-6):
            return f'{name} is still {START[name]}'
        return scales_spared(folder)

    return check


def scales_spared(folder: Path) -> str:
    """A check that no scale of a quantizer has weight decay, and that some
    other parameter has.

    A checkpoint numbers the parameters of an optimizer and does not name them.
    Scales are told by their shape, (1,), which nothing else has here.
    """
    checkpoint = newest(folder)
    optimizer = checkpoint['optimizer']
    scales = [
        name
        for name, value in checkpoint['state_dict'].items()
        if '_quantizer.' in name and value.shape == (1,)
    ]
    others = [
        name
        for name, value in checkpoint['state_dict'].items()
        if name not in scales and value.shape == (1,)
    ]
    if others or not scales:
        return f'expected scales of shape (1,) alone, got {others[:1]}'
    spared, decayed = 0, 0
    for group in optimizer['param_groups']:
        for number in group['params']:
            if not _is_scale(optimizer['state'].get(number, {})):
                decayed += group['weight_decay'] > 0
            elif group['weight_decay']:
                return f'a scale has weight decay {group["weight_decay"]}'
            else:
                spared += 1
    if spared != len(scales):
        return f'expected {len(scales)} scales in the optimizer, got {spared}'
    return '' if decayed else 'nothing has weight decay'


def _is_scale(state: dict) -> bool:
    return any(getattr(value, 'shape', ()) == (1,) for value in state.values())
