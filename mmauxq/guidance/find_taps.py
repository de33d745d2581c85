"""Where a guidance reads the network, found by a training pass."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmauxq.errors import UsageError
from mmauxq.layers import is_quantizable

from .taps import (
    STEM,
    Tap,
    TapRecorder,
    find_blocks,
    find_layers,
    flat_tensors,
    layout_of,
    resolve_taps,
)

AUTO = 'auto'
STAGE_ENDS = 'stage_ends'


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

    def recorder(
        self, model: nn.Module, with_grad: bool = True
    ) -> TapRecorder:
        """That reads here."""
        return TapRecorder(
            model,
            self.names,
            self.stem,
            self.overwritten,
            self.parts,
            with_grad,
        )


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
    place: str = 'guidance.taps',
) -> Taps:
    """Where to read, found by a training pass.

    Args:
        model: A float image classifier; left as it was.
        taps: Shell patterns of module names, or ``'auto'``: the repeated
            blocks of the backbone; else the layers that stand in its lists;
            else its children. What gives no feature map or tokens, or no
            gradient, is passed over. ``'stage_ends'``: of these, the last
            before each change of shape.
        stem: Whether to read the input of the first one too, unless it is
            the image.
        inputs: (1, C, H, W).
        place: Where ``taps`` are from, for messages.

    Raises:
        UsageError: If there is nothing to read.
    """
    if taps in (AUTO, STAGE_ENDS):
        watched = [
            f'backbone.{name}'
            for name, _ in model.backbone.named_modules()
            if name
        ]
        watch = _Watch(model, inputs, watched)
        names = _auto(model, watch)
        if taps == STAGE_ENDS:
            names = _stage_ends(names, watch)
    else:
        names = resolve_taps(model, taps, place)
        watch = _Watch(model, inputs, names)
        for name in names:
            if name not in watch.seen:
                raise UsageError(
                    f'{place}: {name} did not run in this forward pass'
                )
            if not watch.seen[name].grad:
                raise UsageError(
                    f'{place}: {name} runs inside activation checkpointing, '
                    'no gradient leads back from it; tap the checkpointed '
                    'block itself, or set with_cp=False'
                )
            if not watch.parts(name):
                raise UsageError(
                    f'{place}: {name} gives a {watch.seen[name].kind}; only '
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


def _stage_ends(names: Sequence[str], watch: _Watch) -> list[str]:
    """Those after which the shape changes, and the last."""
    names = [name for name in watch.seen if name in set(names)]
    shapes = [
        [watch.seen[name].gave[i].shape for i in watch.parts(name)]
        for name in names
    ]
    return [
        name
        for name, shape, after in zip(
            names, shapes, [*shapes[1:], None], strict=True
        )
        if shape != after
    ]
