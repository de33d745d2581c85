"""What the arguments of JointQAT may be, and what is made of them."""

from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseModel
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import nn

from mmauxq.errors import UsageError
from mmauxq.layers import LayerBits, Policy
from mmauxq.quantizers import FLOAT_BITS
from mmauxq.quantizers.base import check_bits

from . import dry_run


def build_architecture(
    architecture: dict | BaseModel, data_preprocessor: Any
) -> BaseModel:
    """A classifier of mmpretrain from its config, if it is not built yet.

    Raises:
        UsageError: If it has no backbone or no head.
    """
    if isinstance(architecture, dict):
        architecture = dict(architecture)
        architecture.setdefault('_scope_', 'mmpretrain')
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
    """Raise UsageError unless all sections are of their types."""
    if policy is not None and not isinstance(policy, dict):
        raise UsageError(
            f'model.policy={policy!r}; allowed are a dict and None'
        )
    parts = guidance if isinstance(guidance, (list, tuple)) else [guidance]
    if guidance is not None and not (
        parts and all(isinstance(part, dict) for part in parts)
    ):
        raise UsageError(
            f'model.guidance={guidance!r}; allowed are a dict, a list of '
            'dicts, and None'
        )
    if not isinstance(architecture, (dict, nn.Module)):
        raise UsageError(
            f'model.architecture={architecture!r}; allowed is the config of '
            'a classifier'
        )
    if not isinstance(quantizers, dict):
        raise UsageError(
            f'model.quantizers={quantizers!r}; allowed is a dict with the '
            "keys 'weight' and 'activation'"
        )
    for role in ('weight', 'activation'):
        cfg = quantizers.get(role, {})
        if not isinstance(cfg, dict):
            raise UsageError(
                f'model.quantizers.{role}={cfg!r}; allowed is a dict with '
                "'type' and 'bits'"
            )


def check_taps(taps: Any) -> None:
    """Raise UsageError unless these are names or patterns."""
    names = [taps] if isinstance(taps, str) else taps
    if (
        not isinstance(names, (list, tuple))
        or not names
        or not all(isinstance(name, str) for name in names)
    ):
        raise UsageError(
            f"guidance.taps={taps!r}; allowed are 'auto', 'stage_ends', a "
            'pattern of module names, and a list of patterns'
        )


def check_shape(shape: Sequence[int] | None) -> tuple[int, ...] | None:
    """(C, H, W) as a tuple; UsageError if it is another thing."""
    if shape is None:
        return None
    shape = tuple(shape) if isinstance(shape, (list, tuple)) else (shape,)
    if len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise UsageError(
            f'input_shape={shape}; allowed are three positive '
            'integers (C, H, W)'
        )
    return shape


def assign_bits(
    found: dry_run.Pass, quantizers: dict, policy: dict | None
) -> dict:
    """Bits of every layer, by its name: by policy, and float where it must be.

    Raises:
        UsageError: If quantizers or policy ask for what does not exist.
    """
    if set(quantizers) - {'_scope_'} != {'weight', 'activation'}:
        raise UsageError(
            f'quantizers has the keys {sorted(quantizers)}; '
            "allowed and needed are 'weight' and 'activation'"
        )
    for role in ('weight', 'activation'):
        if 'bits' not in quantizers[role]:
            raise UsageError(
                f'model.quantizers.{role}={dict(quantizers[role])} has no '
                f'`bits`; allowed are 1 to 8, and {FLOAT_BITS} for floating '
                'point'
            )
    widths = [
        check_bits(quantizers[role]['bits'], 1, f'quantizers.{role}')
        for role in ('weight', 'activation')
    ]
    policy = {k: v for k, v in (policy or {}).items() if k != '_scope_'}
    unknown = set(policy) - {'first', 'last', 'layers'}
    if unknown:
        raise UsageError(
            f'policy has no {sorted(unknown)}; allowed are '
            "'first', 'last' and 'layers'"
        )
    bits = Policy(**policy).assign(list(found.products), *widths)
    reasons = {p.name: p.reason for p in found.products.values() if p.reason}
    reasons |= {name: 'does not run in evaluation' for name in found.unused}
    for name, reason in reasons.items():
        bits[name] = LayerBits(FLOAT_BITS, FLOAT_BITS, reason)
    return bits
