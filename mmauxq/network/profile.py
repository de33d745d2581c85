"""What one forward pass tells of an architecture: layers, shapes, cost."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmauxq.errors import UsageError, one_line
from mmauxq.forward_hooks import forward_hooks
from mmauxq.layers import LayerUse, QuantLayer, is_quantizable
from mmauxq.layers.quant_layers import is_plain_attention
from mmauxq.layers.weight_uses import CONVOLUTIONS, QUANTIZABLE, WeightTracer
from mmauxq.quantizers import FLOAT_BITS, named_quantizers

from .probing import probing, sample_images

DEFAULT_SIZES = (224, 32, 299, 384)
OTHER_PRODUCTS = re.compile(
    r'r?matmul|(add|b|baddb)?mm|einsum|bilinear|conv_transpose[123]d'
)


@dataclass
class NetworkProfile:
    """What a forward pass in evaluation mode tells of a float classifier.

    Args:
        shape: (C, H, W) of an image.
        images: The smallest batch that the network takes, (N, C, H, W).
        layers: Name of a layer that ran -> use of its weight, in that order.
        unused: Names of layers that did not run.
        multiply_adds: Per image.
        num_classes: K.
        parameters: Their number, shared ones once.
    """

    shape: tuple[int, ...]
    images: Tensor
    layers: dict[str, LayerUse]
    unused: list[str]
    multiply_adds: int
    num_classes: int
    parameters: int


class LayerTracer(WeightTracer):
    """Finds how the weight of each layer is used, wherever that happens.

    A weight may enter a convolution, ``F.linear`` or the attention of
    :class:`torch.nn.MultiheadAttention`: in the layer, or in a module that
    reads the weight of the layer. The network runs on ``batch`` images.

    Attributes:
        layers: Name of a layer that ran -> use of its weight, in that order.
    """

    def __init__(self, model: nn.Module, batch: int) -> None:
        self.batch = batch
        self.layers: dict[str, LayerUse] = {}
        self._modules = dict(model.named_modules())
        self._running: list[str] = []
        super().__init__(self._modules)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Trace what the model computes inside."""
        with ExitStack() as stack:
            for name, module in self._modules.items():
                enter = module.register_forward_pre_hook(
                    lambda *_, name=name: self._running.append(name)
                )
                leave = module.register_forward_hook(
                    lambda *_, name=name: self._leave(name), always_call=True
                )
                stack.enter_context(enter)
                stack.enter_context(leave)
            stack.enter_context(self)
            yield

    def _leave(self, name: str) -> None:
        while self._running and self._running.pop() != name:
            pass

    def product(self, multiply: Callable, x: Tensor, weight: Tensor) -> Any:
        owners = sorted(self.owners_of(weight))
        if owners and self._running:
            self._note_product(owners, x)
        return multiply(x, weight)

    def _note_product(self, owners: list[str], x: Tensor) -> None:
        name = self._running[-1]
        owner = name if name in owners else owners[0]
        use = self._use(owner)
        if x.shape[0] != self.batch and use.sample_size is None:
            use.sample_size = max(x.numel() // self.batch, 1)
        if owner == name and isinstance(self._modules[name], QUANTIZABLE):
            use.called = True
        elif len(owners) > 1:
            for other in owners:
                self._use(other).reason = (
                    f'{name or "the model"} multiplies by a mixture of it '
                    'and other weights'
                )
        elif not isinstance(self._modules[owner], QUANTIZABLE):
            use.reason = 'its weight is a parameter of its own, in no layer'
        elif not owner.startswith(f'{name}.' if name else ''):
            use.reason = f'its weight is read by {name}, outside of it'
        elif name not in use.readers:
            use.readers.append(name)

    def other(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func is F.multi_head_attention_forward:
            self._note_attention(*args[:3])
            return func(*args, **kwargs)
        kind = getattr(func, '__name__', '').strip('_')
        if OTHER_PRODUCTS.fullmatch(kind):
            for name in sorted({n for a in args for n in self.owners_of(a)}):
                use = self._use(name)
                if not use.called and not use.readers:
                    use.reason = f'its weight enters `{kind}`'
        return func(*args, **kwargs)

    def _note_attention(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        name = self._running[-1] if self._running else ''
        running = self._modules[name]
        if not isinstance(running, nn.MultiheadAttention):
            return
        for part in (name, f'{name}.out_proj'):
            use = self._use(part)
            use.called = True
            if not is_plain_attention(running):
                use.reason = (
                    'attention with separate or extra keys and values, or a '
                    'forward of its own'
                )
        size = q.numel()
        if not (q is k and k is v):
            size += k.numel() + v.numel()
        elif running.batch_first:
            return  # samples along axis 0
        self._use(name).sample_size = size // self.batch

    def _use(self, name: str) -> LayerUse:
        return self.layers.setdefault(name, LayerUse(name))


def profile(
    model: nn.Module, shape: Sequence[int] | None = None
) -> NetworkProfile:
    """Run a float image classifier, left as it was, and tell what it is.

    Args:
        shape: (C, H, W) of an image; by default the size that the backbone
            declares, else the first of a few common sizes that it takes.

    Raises:
        UsageError: If the pass fails, or does not end in logits (N, K).
    """
    errors = []
    for candidate in candidate_shapes(model) if shape is None else [shape]:
        # some networks drop the batch axis of a single image
        for count in (1, 2):
            try:
                return _profile(model, sample_images(model, candidate, count))
            except UsageError as error:
                errors.append(error)
    raise errors[0]


def candidate_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes (C, H, W) that the backbone declares, or a few common ones."""
    convolutions = (m for m in model.modules() if isinstance(m, CONVOLUTIONS))
    first = next(convolutions, None)
    channels = 3 if first is None else first.in_channels
    declared = getattr(model.backbone, 'img_size', None)
    if isinstance(declared, (tuple, list)):
        return [(channels, *declared)]
    sizes = [declared] if declared else DEFAULT_SIZES
    return [(channels, size, size) for size in sizes]


def _profile(model: nn.Module, images: Tensor) -> NetworkProfile:
    tracer = LayerTracer(model, len(images))
    try:
        with (
            probing(model),
            FlopCounterMode(display=False) as counter,
            tracer.following(),
        ):
            logits = model(images, mode='tensor')
    except Exception as error:  # a network may fail in any way
        raise UsageError(
            f'architecture: a forward pass on {tuple(images.shape)} fails '
            f'({one_line(error, 200)}); set model.input_shape to the '
            '(C, H, W) of the images that it is trained on'
        ) from error
    logits = logits_in(logits)
    if logits is None:
        raise UsageError(
            'architecture: expected an image classifier whose forward pass '
            'gives logits (N, K)'
        )
    for use in tracer.layers.values():
        if use.called and use.readers:
            use.reason = f'both it and {use.readers[0]} multiply by it'
    layers = [n for n, m in model.named_modules() if is_quantizable(m)]
    return NetworkProfile(
        shape=tuple(images.shape[1:]),
        images=images,
        layers=tracer.layers,
        unused=[name for name in layers if name not in tracer.layers],
        multiply_adds=counter.get_total_flops() // 2 // len(images),
        num_classes=logits.shape[1],
        parameters=count_parameters(model),
    )


def logits_in(output: Any) -> Tensor | None:
    """Logits (N, K) of a classifier: its output, or the first part of it."""
    if isinstance(output, (tuple, list)) and len(output):
        output = output[0]
    if isinstance(output, Tensor) and output.dim() == 2:
        return output
    return None


@contextmanager
def floating(model: nn.Module) -> Iterator[None]:
    """While active, quantizers in ``model`` return what they are given."""
    quantizers = [(q, q.bits) for _, q in named_quantizers(model)]
    for quantizer, _ in quantizers:
        quantizer.bits = FLOAT_BITS
    try:
        yield
    finally:
        for quantizer, bits in quantizers:
            quantizer.bits = bits


def unreached_layers(model: nn.Module, images: Tensor) -> list[str]:
    """Quantized layers of which a pass does not reach both quantizers; the
    model is left as it was."""
    quantizers = [
        (name, quantizer)
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLayer)
        for quantizer in (layer.weight_quantizer, layer.input_quantizer)
    ]
    reached: set[nn.Module] = set()
    with (
        forward_hooks(quantizers, lambda _, q, *args: reached.add(q)),
        probing(model),
        floating(model),
    ):
        model(images, mode='tensor')
    missed = (name for name, q in quantizers if q not in reached)
    return list(dict.fromkeys(missed))


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in module.parameters())
