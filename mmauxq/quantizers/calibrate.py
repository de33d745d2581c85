"""Setting the scales of all quantizers from data, before training."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from .base import Quantizer, named_quantizers


def uncalibrated(model: nn.Module) -> dict[str, Quantizer]:
    """Name -> quantizer, of those in ``model`` that have no scale yet."""
    return {
        name: quantizer
        for name, quantizer in named_quantizers(model)
        if not bool(quantizer.calibrated)
    }


def calibrate(model: nn.Module, run: Callable[[], Any]) -> None:
    """Calibrate those quantizers in ``model`` that ``run`` reaches, which runs
    it on a batch of its data.

    Each takes the first tensor that reaches it, with the layers before it
    already quantized. Quantizers that have a scale keep it. All ranks must run
    the same layers in the same order.
    """

    def on_input(quantizer: Quantizer, args: tuple[Tensor, ...]) -> None:
        if not bool(quantizer.calibrated):
            quantizer.calibrate(args[0])

    with ExitStack() as handles:
        for quantizer in uncalibrated(model).values():
            handle = quantizer.register_forward_pre_hook(on_input)
            handles.enter_context(handle)
        run()
