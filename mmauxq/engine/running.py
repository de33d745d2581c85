"""What hooks and loops ask of a runner."""

from typing import Any

from mmengine.model import is_model_wrapper
from torch import nn


def bare_model(runner: Any) -> nn.Module:
    """The model of a runner, without DDP's wrapper."""
    model = runner.model
    return model.module if is_model_wrapper(model) else model
