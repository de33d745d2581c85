"""Distances between what a student and a teacher compute."""

import inspect
from collections.abc import Sequence

import torch
from torch import nn

from mmauxq import compat
from mmauxq.errors import UsageError


def build_distance(
    config: dict | None, where: str, num_classes: int | None = None
) -> nn.Module | None:
    """A loss of mmrazor that takes a student's and a teacher's tensor.

    ``mmrazor.KLDivergence`` (``tau``) for logits; ``mmrazor.ATLoss``,
    ``L2Loss``, ``CWD``, ``PKDLoss`` and others for features.

    Args:
        config: With ``type``; without a config there is no distance.
        where: The config key, for messages.
        num_classes: K, if it is to compare logits (N, K).

    Raises:
        UsageError: If there is no such loss, or it does not take the
            arguments or these tensors.
    """
    if not config:
        return None
    module = build_module(config, where)
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty]
    if len(needed) != 2:
        raise UsageError(
            f'{where}.type: expected a loss of mmrazor that takes two '
            'tensors, such as mmrazor.KLDivergence, mmrazor.ATLoss or '
            f'mmrazor.L2Loss, got {config["type"]!r}, which takes '
            f'{", ".join(needed)}'
        )
    if num_classes and not comparable(module, *[(2, num_classes)] * 2):
        raise UsageError(
            f'{where}.type: expected a loss that compares logits (N, '
            f'{num_classes}), such as mmrazor.KLDivergence, got '
            f'{config["type"]!r}'
        )
    return module


def comparable(
    distance: nn.Module, ours: Sequence[int], theirs: Sequence[int]
) -> bool:
    """Whether a distance takes tensors of these shapes, without broadcasting;
    from three axes on, they must agree in all but the channels."""
    if len(ours) != len(theirs) or tuple(ours[2:]) != tuple(theirs[2:]):
        return False
    try:
        with torch.no_grad():
            distance(torch.zeros(*ours), torch.zeros(*theirs))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return True


def build_module(config: dict, where: str, **defaults: int) -> nn.Module:
    """A loss or a connector of mmrazor; ``defaults`` are arguments that the
    config leaves out and the class has. See :func:`build_distance`."""
    compat.enable_mmrazor()
    from mmrazor.registry import MODELS

    if not isinstance(config, dict) or 'type' not in config:
        raise UsageError(
            f'{where}: expected a dict with `type`, got {config!r}'
        )
    config = dict(config)
    config.pop('_scope_', None)
    kind = config.pop('type')
    cls = MODELS.get(kind) if isinstance(kind, str) else kind
    if cls is None:
        raise UsageError(
            f'{where}.type: expected a class registered in mmrazor, such as '
            'mmrazor.KLDivergence, mmrazor.ATLoss or mmrazor.L2Loss, got '
            f'{kind!r}'
        )
    known = inspect.signature(cls.__init__).parameters
    for key, value in defaults.items():
        if key in known:
            config.setdefault(key, value)
    try:
        return cls(**config)
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f'{where}: {kind}: {error}') from error
