"""Small helpers of the hooks and loops."""

from collections.abc import Iterator
from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.structures import BaseDataElement
from torch import Tensor, nn


def bare_model(runner: Any) -> nn.Module:
    """The model of a runner, without DDP's wrapper."""
    model = runner.model
    return model.module if is_model_wrapper(model) else model


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, dicts and data samples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, BaseDataElement)):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from tensors_in(inner)
