"""Checks of the arguments of JointQAT."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from mmauxq.errors import UsageError, unknown_name
from mmauxq.layers import Policy
from mmauxq.quantizers import FLOAT_BITS
from mmauxq.quantizers.base import MOST_BITS, ROLES

POLICY = tuple(field.name for field in fields(Policy))


def check_sections(
    architecture: Any, quantizers: Any, policy: Any, guidance: Any
) -> None:
    """Raise UsageError unless all sections are of their types, and those
    without a ``type`` have the keys that they are to have."""
    if policy is not None:
        _check_section('model.policy', policy, 'a dict or None', POLICY)
    parts = guidance if isinstance(guidance, (list, tuple)) else [guidance]
    if guidance is not None:
        _expect(
            len(parts) > 0 and all(isinstance(part, dict) for part in parts),
            'model.guidance',
            'a dict with `type`, a list of such dicts, or None',
            guidance,
        )
    _expect(
        isinstance(architecture, (dict, nn.Module)),
        'model.architecture',
        'the config of a classifier',
        architecture,
    )
    place, both = 'model.quantizers', "'weight' and 'activation'"
    _check_section(place, quantizers, f'a dict with {both}', ROLES)
    _expect(set(ROLES) <= set(quantizers), place, both, dict(quantizers))
    for role in ROLES:
        cfg, place = quantizers[role], f'model.quantizers.{role}'
        _expect(
            isinstance(cfg, dict), place, 'a dict with `type` and `bits`', cfg
        )
        if 'bits' not in cfg:
            raise UsageError(
                f'{place}: expected `bits`, 1 to {MOST_BITS[role]} or '
                f'{FLOAT_BITS} for floating point, got {dict(cfg)}, which has '
                'no `bits`'
            )


def _check_section(
    place: str, section: Any, expected: str, names: Sequence[str]
) -> None:
    _expect(isinstance(section, dict), place, expected, section)
    for key in section:
        if key not in names and key != '_scope_':
            raise unknown_name(place, key, names)


def _expect(ok: bool, place: str, expected: str, got: Any) -> None:
    if not ok:
        raise UsageError(f'{place}: expected {expected}, got {got!r}')


def check_taps(taps: Any) -> None:
    """Raise UsageError unless these are names or patterns."""
    names = [taps] if isinstance(taps, str) else taps
    _expect(
        isinstance(names, (list, tuple))
        and len(names) > 0
        and all(isinstance(name, str) for name in names),
        'guidance.taps',
        "'auto', 'stage_ends', a pattern of module names, or a list of "
        'patterns',
        taps,
    )


def check_shape(shape: Sequence[int] | None) -> tuple[int, ...] | None:
    """(C, H, W) as a tuple.

    Raises:
        UsageError: If it is anything else.
    """
    if shape is None:
        return None
    found = tuple(shape) if isinstance(shape, (list, tuple)) else ()
    _expect(
        len(found) == 3 and all(type(n) is int and n > 0 for n in found),
        'model.input_shape',
        'three positive integers (C, H, W)',
        shape,
    )
    return found
