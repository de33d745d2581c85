"""What one forward pass of a network tells: order, shapes, cost."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmauxq.errors import UsageError
from mmauxq.guidance import Tap, TapRecorder
from mmauxq.layers import is_quantizable
from mmauxq.layers.quantized import CONVOLUTIONS

DEFAULT_SIZE = 224


def input_shape(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) that ``model`` was made for, as far as it says so."""
    channels = next(
        (
            m.in_channels
            for m in model.modules()
            if isinstance(m, CONVOLUTIONS)
        ),
        3,
    )
    size = getattr(model.backbone, 'img_size', None) or DEFAULT_SIZE
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return channels, height, width


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def sample(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """One random image (1, C, H, W) that does not disturb the generator."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *shape, generator=generator).to(device)


def run(model: nn.Module, inputs: Tensor) -> tuple[list[str], int, int]:
    """The layers in the order in which they run, and what a pass costs.

    Args:
        model: A float image classifier; left as it was.
        inputs: (1, C, H, W).

    Returns:
        Names of the convolutions and linear layers that ran, the
        multiply-adds of the pass, and the number of classes K.

    Raises:
        UsageError: If the pass fails, or does not end in logits (N, K).
    """
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: order.append(name)
        )
        for name, module in model.named_modules()
        if is_quantizable(module)
    ]
    try:
        with _evaluating(model), FlopCounterMode(display=False) as counter:
            logits = model(inputs, mode='tensor')
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f'architecture: a forward pass on {tuple(inputs.shape)} fails '
            f'({reason}); set model.input_shape to the (C, H, W) that the '
            'network is trained on'
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(logits, (tuple, list)) and len(logits):
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UsageError(
            'architecture: its forward pass gives no logits '
            '(N, K); an image classifier is needed'
        )
    return (
        list(dict.fromkeys(order)),
        counter.get_total_flops() // 2,
        logits.shape[1],
    )


def probe_taps(
    model: nn.Module, names: Sequence[str], stem: bool, inputs: Tensor
) -> tuple[list[Tap], list[str]]:
    """Shapes at the taps in the order in which they run.

    Returns:
        The taps, and the names of those whose output a later in-place
        operation overwrites.
    """
    recorder = TapRecorder(model, names, stem)
    with _evaluating(model), recorder:
        model(inputs, mode='tensor')
    overwritten = recorder.changed()
    recorder = TapRecorder(model, names, stem, overwritten)
    with _evaluating(model), recorder:
        model(inputs, mode='tensor')
    return [
        Tap(name, tuple(value.shape[1:]))
        for name, value in recorder.outputs().items()
    ], overwritten


def guidance_multiply_adds(
    guidance: nn.Module, taps: Sequence[Tap], device: torch.device
) -> int:
    """Multiply-adds of the guidance's forward pass for one sample."""
    outputs = {
        tap.name: torch.zeros(1, *tap.shape, device=device) for tap in taps
    }
    with _evaluating(guidance), FlopCounterMode(display=False) as counter:
        guidance(outputs)
    return counter.get_total_flops() // 2


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
