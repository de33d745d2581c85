"""What one forward pass of a network tells: order, shapes, cost."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from mmauxq.errors import UsageError
from mmauxq.guidance import Tap, find_blocks, find_layers, resolve_taps
from mmauxq.guidance.taps import STEM, flat_tensors, layout_of
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
class Taps:
    """Where to read, and how.

    Args:
        taps: In the order of running, the stem first if it is read.
        names: Of the modules that are tapped.
        stem: Whether the input of the first of them is read.
        overwritten: Names of taps that a later operation overwrites.
        parts: See :class:`mmauxq.guidance.TapRecorder`.
    """

    taps: list[Tap]
    names: list[str]
    stem: bool
    overwritten: list[str] = field(default_factory=list)
    parts: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class Cost:
    """Size and work at ``shape`` (C, H, W), for one sample."""

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
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
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
            f'({reason}); set model.input_shape to the (C, H, W) that the '
            'network is trained on'
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


# --- taps ------------------------------------------------------------------


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """The backbone as in a training step, without a trace of it afterwards.

    Batch norms stay in evaluation mode: one sample has no statistics. So does
    the head, where some refuse to run outside of their loss.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    buffers = [(b, b.clone()) for b in model.buffers()]
    for module in model.backbone.modules():
        module.training = not isinstance(module, _BatchNorm)
    devices = {b.device for b in model.parameters() if b.is_cuda}
    try:
        with (
            torch.random.fork_rng(list(devices)),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            # they will come, once, when training starts
            warnings.simplefilter('ignore')
            torch.manual_seed(0)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@dataclass
class _Seen:
    """What a module was given and gave."""

    given: list[Tensor]
    gave: list[Tensor]
    versions: list[int]
    kind: str
    grad: bool


class _Watch:
    """A training pass during which modules of the backbone are watched."""

    def __init__(
        self, model: nn.Module, inputs: Tensor, names: Sequence[str]
    ) -> None:
        # else a frozen backbone would seem to send no gradient; its learned
        # scales will
        inputs = self.inputs = inputs.detach().requires_grad_()
        self.seen: dict[str, _Seen] = {}
        self.first_given: dict[str, tuple[list, list[int]]] = {}
        handles = []
        for name in names:
            module = model.get_submodule(name)
            handles += [
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: self._before(
                        name, args or tuple(kwargs.values())
                    ),
                    with_kwargs=True,
                ),
                module.register_forward_hook(
                    lambda _, args, kwargs, gave, name=name: self._after(
                        name, args or tuple(kwargs.values()), gave
                    ),
                    with_kwargs=True,
                ),
            ]
        try:
            with _training(model):
                model(inputs, mode='tensor')
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str, given: tuple) -> None:
        # lists may grow later, as those of a DenseNet do
        arguments = [flat_tensors(argument) for argument in given]
        versions = [t._version for mine in arguments for t in mine]
        self.first_given.setdefault(name, (arguments, versions))

    def _after(self, name: str, given: tuple, gave: object) -> None:
        tensors = flat_tensors(gave)
        self.seen[name] = _Seen(
            flat_tensors(given),
            tensors,
            [t._version for t in tensors],
            type(gave).__name__,
            torch.is_grad_enabled(),
        )

    def chained(self, names: list[str]) -> bool:
        """Whether each takes a tensor that the one before gives."""
        if any(name not in self.seen for name in names):
            return False
        return all(
            any(
                given is gave
                for given in self.seen[after].given
                for gave in self.seen[before].gave
            )
            for before, after in zip(names, names[1:], strict=False)
        )

    def parts(self, name: str) -> tuple[int, ...]:
        """Which of the tensors that a module gives are features."""
        return tuple(
            i
            for i, tensor in enumerate(self.seen[name].gave)
            if tensor.is_floating_point()
            and tensor.dim() > 1
            and tensor.shape[0] == len(self.inputs)
        )

    def usable(self, name: str) -> bool:
        """Whether the module gives features that a gradient comes from."""
        seen = self.seen.get(name)
        return (
            seen is not None
            and seen.grad
            and any(
                seen.gave[i].dim() in (3, 4) and seen.gave[i].requires_grad
                for i in self.parts(name)
            )
        )


def find_taps(
    model: nn.Module,
    taps: str | Sequence[str],
    stem: bool,
    inputs: Tensor,
) -> Taps:
    """Where to read, found by a training pass.

    Args:
        model: A float image classifier; left as it was.
        taps: Shell patterns of module names, or ``'auto'``: the repeated
            blocks of the backbone; else the layers that stand in its lists;
            else its children. What gives no feature map or tokens, or no
            gradient, is passed over.
        stem: Whether to read the input of the first one too, unless it is
            the image.
        inputs: (1, C, H, W).

    Raises:
        UsageError: If there is nothing to read.
    """
    if taps == 'auto':
        watched = [
            f'backbone.{name}'
            for name, _ in model.backbone.named_modules()
            if name
        ]
        watch = _Watch(model, inputs, watched)
        names = _auto(model, watch)
    else:
        names = resolve_taps(model, taps)
        watch = _Watch(model, inputs, names)
        for name in names:
            if name not in watch.seen:
                raise UsageError(
                    f'taps: {name} did not run in this forward pass'
                )
            if not watch.seen[name].grad:
                raise UsageError(
                    f'taps: {name} runs inside activation checkpointing, no '
                    'gradient leads back from it; tap the checkpointed block '
                    'itself, or set with_cp=False'
                )
            if not watch.parts(name):
                raise UsageError(
                    f'taps: {name} gives a {watch.seen[name].kind}; only '
                    'modules that give feature maps or tokens can be tapped'
                )
    names = [name for name in watch.seen if name in set(names)]
    found = Taps([], names, False)
    if stem:
        _read_stem(found, watch, watch.inputs)
    for name in names:
        seen, parts = watch.seen[name], watch.parts(name)
        if seen.kind not in ('Tensor', 'Parameter'):
            found.parts[name] = parts
        for i in parts:
            key = name if len(parts) == 1 else f'{name}:{i}'
            found.taps.append(_tap(key, seen.gave[i], inputs))
            if seen.gave[i]._version != seen.versions[i]:
                found.overwritten.append(key)
    return found


def _read_stem(found: Taps, watch: _Watch, inputs: Tensor) -> None:
    """Add what enters the first tapped module, unless it is the image."""
    arguments, versions = watch.first_given[found.names[0]]
    tensors = [tensor for mine in arguments for tensor in mine]
    offset = 0
    for mine in arguments:
        features = [
            i
            for i, tensor in enumerate(mine, offset)
            if tensor.is_floating_point()
            and tensor.dim() in (3, 4)
            and tensor.shape[0] == len(inputs)
            and tensor is not inputs
        ]
        offset += len(mine)
        if features:
            break
    else:
        return
    found.stem = True
    found.parts[STEM] = tuple(features)
    for i in features:
        key = STEM if len(features) == 1 else f'{STEM}:{i}'
        found.taps.append(_tap(key, tensors[i], inputs))
        if tensors[i]._version != versions[i]:
            found.overwritten.append(key)


def _tap(name: str, tensor: Tensor, inputs: Tensor) -> Tap:
    shape = tuple(tensor.shape[1:])
    return Tap(name, shape, layout_of(shape, inputs.shape[1:]))


def _auto(model: nn.Module, watch: _Watch) -> list[str]:
    children = [
        (f'backbone.{name}', child)
        for name, child in model.backbone.named_children()
    ]
    for names in (
        find_blocks(model, watch.chained),
        find_layers(model),
        [
            name
            for name, child in children
            if sum(map(is_quantizable, child.modules())) > 1
        ],
        [name for name, _ in children],
    ):
        usable = [name for name in names if watch.usable(name)]
        if usable:
            return usable
    raise UsageError(
        "taps='auto' finds no block with a feature map or tokens in "
        f'{type(model.backbone).__name__}; name the modules to tap'
    )


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
