"""What one forward pass of a network tells: order, shapes, cost."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmauxq.errors import UsageError
from mmauxq.guidance import Guidance, Tap
from mmauxq.guidance.taps import IMAGE
from mmauxq.layers import (
    Product,
    ProductTrace,
    QuantizedLayer,
    is_quantizable,
)
from mmauxq.layers.quantized import CONVOLUTIONS
from mmauxq.quantizers import FLOAT_BITS, named_quantizers

DEFAULT_SIZES = (224, 32, 299, 384)


@dataclass
class Pass:
    """What a forward pass of a float network told.

    Args:
        products: Name of a layer that ran -> how, in the order of running.
        unused: Names of layers that did not run.
        multiply_adds: Of the pass.
        num_classes: K.
    """

    products: dict[str, Product]
    unused: list[str]
    multiply_adds: int
    num_classes: int


@dataclass
class Cost:
    """Size and work at ``shape`` (C, H, W), for one sample.

    That of the guidance is the sum over all guidances, with what they use and
    do not train, such as a teacher.
    """

    shape: tuple[int, ...]
    num_classes: int
    parameters: int
    multiply_adds: int
    guidance_parameters: int = 0
    guidance_multiply_adds: int = 0


def input_shape(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) that ``model`` was made for.

    What the backbone says; else the first of a few common sizes on which it
    runs.
    """
    channels = next(
        (
            m.in_channels
            for m in model.modules()
            if isinstance(m, CONVOLUTIONS)
        ),
        3,
    )
    size = getattr(model.backbone, 'img_size', None)
    if size:
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return channels, height, width
    for size in DEFAULT_SIZES:
        shape = (channels, size, size)
        try:
            with _evaluating(model):
                model(sample(model, shape, 2), mode='tensor')
        except Exception:  # whatever it raises, it does not run
            continue
        return shape
    return channels, DEFAULT_SIZES[0], DEFAULT_SIZES[0]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without a trace afterwards, also of a network that seeds (RevViT)."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    model.eval()
    try:
        with torch.random.fork_rng(list(devices)), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def sample(model: nn.Module, shape: Sequence[int], count: int = 1) -> Tensor:
    """Random images (count, C, H, W) that do not disturb the generator."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *shape, generator=generator).to(device)


def run(model: nn.Module, inputs: Tensor) -> Pass:
    """The layers in the order in which they run, and what a pass costs.

    Args:
        model: A float image classifier; left as it was.
        inputs: (N, C, H, W).

    Raises:
        UsageError: If the pass fails, or does not end in logits (N, K).
    """
    trace = ProductTrace(model)
    try:
        with (
            _evaluating(model),
            FlopCounterMode(display=False) as counter,
            trace.following(model),
        ):
            logits = model(inputs, mode='tensor')
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f'architecture: a forward pass on {tuple(inputs.shape)} fails '
            f'({reason}); model.input_shape is the (C, H, W) of the images '
            'that it is trained on'
        ) from error
    if isinstance(logits, (tuple, list)) and len(logits):
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UsageError(
            'architecture: its forward pass gives no logits '
            '(N, K); an image classifier is needed'
        )
    for product in trace.products.values():
        if product.called and product.readers:
            product.reason = f'both it and {product.readers[0]} multiply by it'
    return Pass(
        trace.products,
        [
            name
            for name, module in model.named_modules()
            if is_quantizable(module) and name not in trace.products
        ],
        counter.get_total_flops() // 2 // len(inputs),
        logits.shape[1],
    )


def first_pass(model: nn.Module, shape: Sequence[int]) -> tuple[Tensor, Pass]:
    """The smallest batch that ``model`` takes, and :func:`run` on it.

    Some networks drop the batch axis of a single image.
    """
    inputs = sample(model, shape)
    try:
        return inputs, run(model, inputs)
    except UsageError as error:
        inputs = sample(model, shape, 2)
        try:
            return inputs, run(model, inputs)
        except UsageError:
            raise error from None


@contextmanager
def floating(model: nn.Module) -> Iterator[None]:
    """While active, quantizers in ``model`` pass on what they get."""
    quantizers = [(q, q.bits) for _, q in named_quantizers(model)]
    for quantizer, _ in quantizers:
        quantizer.bits = FLOAT_BITS
    try:
        yield
    finally:
        for quantizer, bits in quantizers:
            quantizer.bits = bits


def idle_layers(model: nn.Module, inputs: Tensor) -> list[str]:
    """Quantized layers whose quantizers a pass does not reach.

    Args:
        model: A quantized image classifier; left as it was.
        inputs: (1, C, H, W).
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer)
    }
    reached: set[tuple[str, str]] = set()
    roles = ('weight_quantizer', 'input_quantizer')
    handles = [
        getattr(layer, role).register_forward_pre_hook(
            lambda _, args, key=(name, role): reached.add(key)
        )
        for name, layer in layers.items()
        for role in roles
    ]
    try:
        with _evaluating(model), floating(model):
            model(inputs, mode='tensor')
    finally:
        for handle in handles:
            handle.remove()
    return [
        name
        for name in layers
        if any((name, role) not in reached for role in roles)
    ]


def guidance_multiply_adds(
    guidance: Guidance, taps: Sequence[Tap], model: nn.Module, inputs: Tensor
) -> int:
    """Multiply-adds of the guidance's forward pass for one sample.

    Args:
        guidance: Left as it was.
        taps: What it reads.
        model: F, which it may run; left as it was.
        inputs: (N, C, H, W).
    """
    outputs = {
        tap.name: torch.zeros(len(inputs), *tap.shape, device=inputs.device)
        for tap in taps
    }
    outputs[IMAGE] = inputs
    with ExitStack() as stack:
        for module in (guidance, model):
            stack.enter_context(_evaluating(module))
        for recorder in guidance.recorders:
            stack.enter_context(recorder)
        with FlopCounterMode(display=False) as counter:
            guidance(outputs)
    return counter.get_total_flops() // 2 // len(inputs)


def with_unit(count: int) -> str:
    """A count for people: ``'640'``, ``'623.10 k'``, ``'1.81 G'``."""
    for unit, size in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if count >= size:
            return f'{count / size:.2f} {unit}'
    return str(count)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    modules = [module, *getattr(module, 'frozen', [])]
    return sum(p.numel() for part in modules for p in part.parameters())
