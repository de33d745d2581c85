"""Distances between what a student and a teacher compute."""

import inspect
from collections.abc import Sequence

import torch
from torch import nn

from mmauxq import compat
from mmauxq.errors import UsageError


def build_distance(
    config: dict, where: str, num_classes: int | None = None
) -> nn.Module:
    """A loss of mmrazor that takes a student's and a teacher's tensor.

    ``mmrazor.KLDivergence`` (``tau``) for logits; ``mmrazor.ATLoss``,
    ``L2Loss``, ``CWD``, ``PKDLoss`` and others for features.

    Args:
        config: With ``type``, e.g. ``'mmrazor.KLDivergence'``.
        where: What to call the config in a message.
        num_classes: K, if it is to compare logits (N, K).

    Raises:
        UsageError: If there is no such loss, it does not take the arguments,
            or it compares anything else than two tensors, or no logits.
    """
    module = _build(config, where, {})
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty]
    if len(needed) != 2:
        raise UsageError(
            f'{where}.type={config["type"]!r} takes {", ".join(needed)}; '
            'allowed are losses of mmrazor that take two tensors, such as '
            'mmrazor.KLDivergence, mmrazor.ATLoss and mmrazor.L2Loss'
        )
    if num_classes and not comparable(module, *[(2, num_classes)] * 2):
        raise UsageError(
            f'{where}.type={config["type"]!r} does not compare logits (N, '
            f'{num_classes}); mmrazor.KLDivergence does'
        )
    return module


def comparable(
    distance: nn.Module, mine: Sequence[int], its: Sequence[int]
) -> bool:
    """Whether a distance takes these shapes, without stretching an axis.

    Args:
        distance: Of :func:`build_distance`.
        mine: Shape of the student's tensor.
        its: Shape of the teacher's.
    """
    if len(mine) != len(its) or tuple(mine[2:]) != tuple(its[2:]):
        return False
    try:
        with torch.no_grad():
            distance(torch.zeros(*mine), torch.zeros(*its))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return True


def build_connector(
    config: dict, in_channels: int, out_channels: int, where: str
) -> nn.Module:
    """A connector of mmrazor, from a student's width to a teacher's.

    Args:
        config: With ``type``, e.g. ``'mmrazor.ConvModuleConnector'``; the
            widths are filled in where the class has them.
        in_channels: Of the student's features.
        out_channels: Of the teacher's.
        where: What to call the config in a message.

    Raises:
        UsageError: If there is no such connector, or it does not take the
            arguments.
    """
    widths = dict(in_channel=in_channels, out_channel=out_channels)
    return _build(config, where, widths)


def _build(config: dict, where: str, defaults: dict) -> nn.Module:
    compat.enable_mmrazor()
    from mmrazor.registry import MODELS

    if not isinstance(config, dict) or 'type' not in config:
        raise UsageError(f'{where}={config!r}; allowed is a dict with `type`')
    config = {k: v for k, v in config.items() if k != '_scope_'}
    kind = config.pop('type')
    cls = MODELS.get(kind) if isinstance(kind, str) else kind
    if cls is None:
        raise UsageError(
            f'{where}.type={kind!r} is not registered; there are '
            'mmrazor.KLDivergence, mmrazor.ATLoss, mmrazor.L2Loss, ...'
        )
    known = inspect.signature(cls.__init__).parameters
    for key, value in defaults.items():
        if key in known:
            config.setdefault(key, value)
    try:
        return cls(**config)
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f'{where}: {kind}: {error}') from error
