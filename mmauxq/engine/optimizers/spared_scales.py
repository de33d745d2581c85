"""Weight decay that leaves the scales of quantizers alone."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from mmauxq.errors import UsageError
from mmauxq.guidance.teacher import Teacher
from mmauxq.quantizers import scales_of


def spare_scales(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    custom_keys: Iterable[tuple[str, dict]] = (),
) -> None:
    """Set the weight decay of quantizer scales to 0.

    It would pull a learned step towards zero, where it only coarsens the
    levels. The groups of an optimizer that has not made a step yet are split
    for that, frozen teachers are taken out, and groups of the same settings
    are joined, which launches fewer kernels. Without quantizers in ``model``
    nothing changes.

    Args:
        optimizer: Of the parameters of ``model``, whoever built it.
        model: The network.
        custom_keys: Those of ``paramwise_cfg``. A key that names a quantizer
            and sets its ``decay_mult`` or ``weight_decay`` overrides the rule.

    Raises:
        UsageError: If the groups of the optimizer cannot be split, because
            another one inside has copies of them.
    """
    scales = scales_of(model)
    if not scales:
        return
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        raise UsageError(
            'optim_wrapper.optimizer.type: expected an optimizer whose '
            'parameters can be regrouped, so that the scales of quantizers do '
            'not decay, got ZeroRedundancyOptimizer; use the one inside'
        )
    frozen = {
        parameter
        for module in model.modules()
        if isinstance(module, Teacher) and not module.trained
        for parameter in module.parameters()
    }
    decided = any(
        'quantizer' in key and {'decay_mult', 'weight_decay'} & set(value)
        for key, value in custom_keys
    )
    groups: dict[str, dict] = {}
    for group in optimizer.param_groups:
        parts = [
            (group, [p for p in group['params'] if p not in scales | frozen]),
            (group, [p for p in group['params'] if p in scales]),
        ]
        if 'weight_decay' in group and not decided:
            parts[1] = dict(group, weight_decay=0.0), parts[1][1]
        for settings, parameters in parts:
            if parameters:
                _join(groups, settings, parameters)
    optimizer.param_groups[:] = groups.values()
    if type(optimizer) is torch.optim.SGD:
        _run_at_once(optimizer)


def _join(groups: dict[str, dict], settings: dict, parameters: list) -> None:
    settings = {k: v for k, v in settings.items() if k != 'params'}
    key = repr(sorted(settings.items()))
    groups.setdefault(key, dict(settings, params=[]))['params'] += parameters


def _run_at_once(optimizer: torch.optim.SGD) -> None:
    """SGD on a CPU handles all parameters in one call, as by default on a
    GPU: the numbers are the same, in less than half the time."""
    for group in optimizer.param_groups:
        chosen = group['fused'] or group['differentiable']
        on_cpu = all(p.device.type == 'cpu' for p in group['params'])
        if on_cpu and not chosen and group['foreach'] is None:
            group['foreach'] = True
