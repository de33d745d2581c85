"""Where in a network numbers stopped being finite."""

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn

from mmauxq.forward_hooks import forward_hooks

from .running import tensors_in


def is_finite(value: Any) -> bool:
    """Whether no tensor in ``value`` holds NaN or infinity."""
    answers: dict[torch.device, list[Tensor]] = {}
    for x in tensors_in(value):
        if x.is_floating_point():
            answers.setdefault(x.device, []).append(x.isfinite().all())
    # each question makes the host wait for the device: one is enough
    return all(bool(torch.stack(each).all()) for each in answers.values())


def bad_sample(batch: Any) -> int | None:
    """Index of the first input of a batch that is not finite."""
    inputs = batch.get('inputs') if isinstance(batch, dict) else None
    if inputs is None or is_finite(inputs):
        return None
    return next(i for i, sample in enumerate(inputs) if not is_finite(sample))


@torch.no_grad()
def first_bad_place(
    model: nn.Module, batch: Any, bad_gradients: Set[str] = frozenset()
) -> str:
    """Name the first place where a training step is not finite.

    The step is repeated without gradients: parameters, input, the output of
    each layer in the order of running, losses. If all of them are finite,
    it is a gradient: the first one that the backward pass computes. The
    buffers of ``model`` change as in any training step.

    Args:
        model: A model with ``data_preprocessor`` and mode ``loss``.
        batch: As it came from the data loader.
        bad_gradients: Names of parameters whose gradient is not finite.
    """
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            return f'parameter {name}'
    sample = bad_sample(batch)
    if sample is not None:
        return f'the input, sample {sample} of the batch'
    order: list[str] = []
    bad: list[str] = []

    def note(name: str, module: Any, x: Any, output: Any) -> None:
        order.append(name)
        if not bad and not is_finite(output):
            bad.append(name)

    layers = [
        (name, module)
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    with forward_hooks(layers, note):
        losses = model(**model.data_preprocessor(batch, True), mode='loss')
    if bad:
        return f'the output of {bad[0]}'
    for name, value in losses.items():
        if not is_finite(value):
            return name
    for module in reversed(order):
        for name in sorted(bad_gradients):
            if name.rpartition('.')[0] == module:
                return f'the gradient of {name}'
    return f'the gradient of {min(bad_gradients, default="an unknown layer")}'
