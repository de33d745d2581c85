"""What the arguments of JointQAT may be, and what is made of them."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from mmengine.model import BaseModel
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import nn

from mmauxq.errors import UsageError, unknown_name
from mmauxq.layers import LayerBits, Policy
from mmauxq.quantizers import FLOAT_BITS
from mmauxq.quantizers.base import check_bits

from . import dry_run

ROLES = ('weight', 'activation')
POLICY = tuple(field.name for field in fields(Policy))


def build_architecture(
    architecture: dict | BaseModel, data_preprocessor: Any
) -> BaseModel:
    """A classifier of mmpretrain from its config, if it is not built yet.

    Raises:
        UsageError: If it has no backbone or no head.
    """
    if isinstance(architecture, dict):
        architecture = dict(architecture)
        # that of this package marks what was inherited from its configs
        if architecture.get('_scope_') in (None, 'mmauxq'):
            architecture['_scope_'] = 'mmpretrain'
        if data_preprocessor is not None:
            architecture.setdefault('data_preprocessor', data_preprocessor)
        architecture = MMPRETRAIN_MODELS.build(architecture)
    missing = [
        part
        for part in ('backbone', 'head')
        if not isinstance(getattr(architecture, part, None), nn.Module)
    ]
    if missing:
        raise UsageError(
            f'architecture: a {type(architecture).__name__} has no '
            f'{" and no ".join(missing)}; an mmpretrain image classifier '
            'with backbone and head is needed'
        )
    return architecture


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
    """(C, H, W) as a tuple; UsageError if it is another thing."""
    if shape is None:
        return None
    found = tuple(shape) if isinstance(shape, (list, tuple)) else ()
    if len(found) != 3 or not all(type(n) is int and n > 0 for n in found):
        raise UsageError(
            'model.input_shape: expected three positive integers (C, H, W), '
            f'got {shape!r}'
        )
    return found


def assign_bits(
    found: dry_run.Pass, quantizers: dict, policy: dict | None
) -> dict:
    """Bits of every layer, by its name: by policy, and float where it must be.

    Raises:
        UsageError: If quantizers or policy ask for what does not exist.
    """
    widths = [
        check_bits(quantizers[role]['bits'], 1, f'model.quantizers.{role}')
        for role in ROLES
    ]
    policy = {k: v for k, v in (policy or {}).items() if k != '_scope_'}
    bits = Policy(**policy).assign(list(found.products), *widths)
    reasons = {p.name: p.reason for p in found.products.values() if p.reason}
    reasons |= {name: 'does not run in evaluation' for name in found.unused}
    for name, reason in reasons.items():
        bits[name] = LayerBits(FLOAT_BITS, FLOAT_BITS, reason)
    return bits
