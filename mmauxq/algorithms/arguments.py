"""Checks of the arguments of JointQAT."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from mmauxq.errors import UsageError, unknown_name
from mmauxq.layers import Policy
from mmauxq.quantizers import FLOAT_BITS
from mmauxq.quantizers.base import ROLES

POLICY = tuple(field.name for field in fields(Policy))


def check_sections(
    architecture: Any, quantizers: Any, policy: Any, guidance: Any
) -> None:
    """Raise UsageError unless all sections are of their types, and those
    without a ``type`` have the keys that they are to have."""
    if policy is not None:
        _check_dict('model.policy', policy, 'a dict or None')
        _check_keys('model.policy', policy, POLICY)
    parts = guidance if isinstance(guidance, (list, tuple)) else [guidance]
    if guidance is not None and not (
        parts and all(isinstance(part, dict) for part in parts)
    ):
        raise UsageError(
            'model.guidance: expected a dict with `type`, a list of such '
            f'dicts, or None, got {guidance!r}'
        )
    if not isinstance(architecture, (dict, nn.Module)):
        raise UsageError(
            'model.architecture: expected the config of a classifier, got '
            f'{architecture!r}'
        )
    _check_dict('model.quantizers', quantizers, f'a dict with {_both()}')
    _check_keys('model.quantizers', quantizers, ROLES)
    for role in ROLES:
        place = f'model.quantizers.{role}'
        if role not in quantizers:
            raise UsageError(
                f'model.quantizers: expected {_both()}, got no {role!r}'
            )
        cfg = quantizers[role]
        _check_dict(place, cfg, 'a dict with `type` and `bits`')
        if 'bits' not in cfg:
            raise UsageError(
                f'{place}: expected `bits`, 1 to 8 or {FLOAT_BITS} for '
                f'floating point, got {dict(cfg)}, which has no `bits`'
            )


def _both() -> str:
    return ' and '.join(map(repr, ROLES))


def _check_dict(place: str, value: Any, expected: str) -> None:
    if not isinstance(value, dict):
        raise UsageError(f'{place}: expected {expected}, got {value!r}')


def _check_keys(place: str, section: dict, names: Sequence[str]) -> None:
    for key in section:
        if key not in names and key != '_scope_':
            raise unknown_name(place, key, names)


def check_taps(taps: Any) -> None:
    """Raise UsageError unless these are names or patterns."""
    names = [taps] if isinstance(taps, str) else taps
    if (
        not isinstance(names, (list, tuple))
        or not names
        or not all(isinstance(name, str) for name in names)
    ):
        raise UsageError(
            "guidance.taps: expected 'auto', 'stage_ends', a pattern of "
            f'module names, or a list of patterns, got {taps!r}'
        )


def check_shape(shape: Sequence[int] | None) -> tuple[int, ...] | None:
    """(C, H, W) as a tuple.

    Raises:
        UsageError: If it is anything else.
    """
    if shape is None:
        return None
    found = tuple(shape) if isinstance(shape, (list, tuple)) else ()
    if len(found) != 3 or not all(type(n) is int and n > 0 for n in found):
        raise UsageError(
            'model.input_shape: expected three positive integers (C, H, W), '
            f'got {shape!r}'
        )
    return found
