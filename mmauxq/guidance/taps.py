"""Reading the output of a block while the network runs."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmauxq.errors import UsageError
from mmauxq.layers import is_quantizable
from mmauxq.layers.chains import StandIn, settled
from mmauxq.layers.policy import match

STEM = 'stem'
"""Key of the tensor that enters the first tapped block."""

IMAGE = 'image'
"""Key of the preprocessed images."""

MAP = 'map'
CHANNELS_LAST = 'channels_last'
TOKENS = 'tokens'


@dataclass(frozen=True)
class Tap:
    """A place to read, and what is found there.

    Args:
        name: Name of the module whose output is read; ``'stem'`` for the
            input of the first tapped block, ``'image'`` for that of F. A
            module that gives several tensors has a tap for each,
            ``'name:0'``, ``'name:1'``, ...
        shape: Of one sample, without the batch axis: (C, H, W), (H, W, C) or
            (L, C).
        layout: ``'map'`` for (N, C, H, W), ``'channels_last'`` for
            (N, H, W, C), ``'tokens'`` for (N, L, C).
    """

    name: str
    shape: tuple[int, ...]
    layout: str = MAP

    @property
    def module(self) -> str:
        """The name without the number of the part."""
        return self.name.partition(':')[0]


def layout_of(shape: Sequence[int], image: Sequence[int]) -> str:
    """How a tensor is laid out.

    Args:
        shape: Of one sample.
        image: (C, H, W) of the input. The axes whose ratio is that of the
            image are the spatial ones.
    """
    if len(shape) == 2:
        return TOKENS
    if len(shape) != 3:
        return MAP

    def distortion(height: int, width: int) -> float:
        ratio = height * image[2] / (width * image[1])
        return max(ratio, 1 / ratio)

    last = distortion(*shape[:2]) < distortion(*shape[1:])
    return CHANNELS_LAST if last else MAP


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList))


def _has_children(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _layers(module: nn.Module) -> int:
    return sum(is_quantizable(inner) for inner in module.modules())


def find_blocks(
    model: nn.Module, chained: Callable[[list[str]], bool] | None = None
) -> list[str]:
    """Names of the repeated blocks of ``model.backbone``.

    A block is a child of a Sequential or ModuleList, has children itself and
    is not inside another block; so the stages of a ResNet are passed through
    and their residual blocks are found. So is one of at least three children
    of the backbone that are of one class and have several layers. A stage
    that is no list but holds one, as in a Swin Transformer, is passed through
    as well if what it holds are modules of several layers of which each takes
    what the one before gives.

    Args:
        model: An image classifier.
        chained: Whether modules of these names take what the one before
            gives; without it, such stages are themselves the blocks.
    """
    blocks: list[str] = []

    def visit(prefix: str, module: nn.Module) -> None:
        alike = Counter(type(child) for child in module.children())
        for name, child in module.named_children():
            path = f'{prefix}.{name}'
            # the backbone itself may be the list
            inside = _is_list(module) or (
                module is model.backbone
                and alike[type(child)] > 2
                and _layers(child) > 1
            )
            if inside and not _is_list(child) and _has_children(child):
                blocks.extend(_inner_blocks(path, child, chained) or [path])
            else:
                visit(path, child)

    visit('backbone', model.backbone)
    return blocks


def _inner_blocks(
    path: str, module: nn.Module, chained: Callable[[list[str]], bool] | None
) -> list[str]:
    if chained is None:
        return []
    found: list[str] = []
    for name, child in module.named_children():
        members = list(child.named_children())
        names = [f'{path}.{name}.{member}' for member, _ in members]
        if (
            _is_list(child)
            and len(members) > 1
            and all(
                _has_children(member) and _layers(member) > 1
                for _, member in members
            )
            and chained(names)
        ):
            found += names
    return found


def find_layers(model: nn.Module) -> list[str]:
    """Names of the layers that stand in a list of ``model.backbone``.

    For networks that repeat bare layers instead of blocks.
    """
    return [
        f'backbone.{path}.{name}' if path else f'backbone.{name}'
        for path, module in model.backbone.named_modules()
        if _is_list(module)
        for name, child in module.named_children()
        if is_quantizable(child)
    ]


def resolve_taps(
    model: nn.Module,
    taps: str | Sequence[str],
    place: str = 'guidance.taps',
) -> list[str]:
    """Module names that ``taps`` stands for.

    Args:
        model: An image classifier.
        taps: Shell patterns of module names such as ``'backbone.layer*.*'``.
            A ``*`` does not cross a dot, so that the pattern above means
            blocks, not their layers.
        place: Where they are from, for the message.

    Raises:
        UsageError: If nothing is found; the message lists what exists.
    """
    blocks = find_blocks(model)
    names = [name for name, _ in model.named_modules() if name]
    chosen: list[str] = []
    for pattern in [taps] if isinstance(taps, str) else taps:
        depth = pattern.count('.')
        level = [name for name in names if name.count('.') == depth]
        try:
            found = match(pattern, level or names, place)
        except UsageError:
            found = match(pattern, blocks or names, place)
        chosen += [name for name in found if name not in chosen]
    return chosen


class TapRecorder:
    """Keeps the outputs of modules while it is entered.

    A hook sees a tensor at the moment at which its module returns. Two things
    can make that tensor a lie, and both are refused with an error: a later
    in-place operation that overwrites it (a residual sum, an in-place
    activation), and a module that runs inside activation checkpointing, where
    no gradient leads back from it. Outputs named in ``overwritten`` are
    copied instead, which mends the first.

    Args:
        model: The network that contains the modules.
        names: Module names, in any order.
        stem: Whether to keep also the input of the module that runs first,
            under the key ``'stem'``.
        overwritten: Names whose output is known to be overwritten later.
        parts: Name -> which of the tensors that the module gives are kept,
            for modules that give a tuple or list. One is kept under the name
            itself, several as ``'name:0'``, ``'name:1'``, ...
        with_grad: Whether a gradient must lead back from them.

    Attributes:
        active: Whether it is entered.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        stem: bool = False,
        overwritten: Sequence[str] = (),
        parts: dict[str, tuple[int, ...]] | None = None,
        with_grad: bool = True,
    ) -> None:
        self.names = list(names)
        self.stem = stem
        self.overwritten = set(overwritten)
        self.parts = dict(parts or {})
        self.with_grad = with_grad
        # by name, each time: conversion and SyncBN replace modules
        self._model = model
        self._outputs: dict[str, Tensor | StandIn] = {}
        self._versions: dict[str, int] = {}
        self._ran: set[str] = set()
        self._handles: list[RemovableHandle] = []
        self._grad = False
        self.active = False

    def __enter__(self) -> 'TapRecorder':
        self._outputs, self._versions, self._ran = {}, {}, set()
        self.active = True
        self._grad = self.with_grad and torch.is_grad_enabled()
        for name in self.names:
            module = self._model.get_submodule(name)
            if self.stem:
                self._handles.append(
                    module.register_forward_pre_hook(
                        self._keep_input, with_kwargs=True
                    )
                )
            self._handles.append(
                module.register_forward_hook(
                    lambda _, args, output, name=name: self._keep(name, output)
                )
            )
        return self

    def __exit__(self, *exc: object) -> None:
        # Checkpointed blocks run again in the backward pass; by then nobody
        # listens any more.
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.active = False

    def _keep_input(
        self, module: nn.Module, args: tuple, kwargs: dict
    ) -> None:
        if not self._ran:
            given = args or tuple(kwargs.values())
            if STEM in self.parts:
                self._keep(STEM, given)
            else:
                self._keep(STEM, given[0] if given else None)

    def _keep(self, name: str, value: object) -> None:
        if self._grad and not torch.is_grad_enabled():
            raise UsageError(
                f'taps: {name} runs inside activation checkpointing, no '
                'gradient leads back from it; tap the checkpointed block '
                'itself, or set with_cp=False'
            )
        self._ran.add(name)
        for key, tensor in self._tensors(name, value).items():
            if key in self.overwritten:
                tensor = settled(tensor).clone()
            self._outputs[key] = tensor
            if isinstance(tensor, Tensor):
                self._versions[key] = tensor._version

    def _tensors(
        self, name: str, value: object
    ) -> 'dict[str, Tensor | StandIn]':
        if isinstance(value, (Tensor, StandIn)):
            return {name: value}
        kept = self.parts.get(name)
        if kept is None:
            raise UsageError(
                f'taps: {name} gives a {type(value).__name__}; '
                'only modules that give feature maps or tokens can be tapped'
            )
        tensors = flat_tensors(value)
        if len(kept) == 1:
            return {name: tensors[kept[0]]}
        return {f'{name}:{i}': tensors[i] for i in kept}

    def restart(self) -> None:
        """Forget what was kept: the network runs once more."""
        self.release()
        self._ran.clear()

    def release(self) -> None:
        """Let go of what was kept."""
        # cleared, not replaced: a compiled step gives back what was put into
        # a dictionary that it found
        self._outputs.clear()
        self._versions.clear()

    def changed(self) -> list[str]:
        """Names whose tensor was overwritten after it was read."""
        return [
            name
            for name, version in self._versions.items()
            if self._outputs[name]._version != version
        ]

    def outputs(self) -> dict[str, Tensor]:
        """Name -> tensor, in the order in which the modules ran.

        Raises:
            UsageError: If one was overwritten, or a module did not run.
        """
        # a compiled step was eager once, and seen to be in order
        changed = [] if torch.compiler.is_compiling() else self.changed()
        if changed:
            raise UsageError(
                f'taps: the output of {changed[0]} is '
                'overwritten in place by a later operation; tap '
                'another module, or make that operation '
                'out of place'
            )
        missing = [name for name in self.names if name not in self._ran]
        if missing:
            raise UsageError(
                f'taps: {missing[0]} did not run in this forward pass'
            )
        return {name: settled(v) for name, v in self._outputs.items()}


def flat_tensors(value: object) -> 'list[Tensor | StandIn]':
    """The tensors in a tensor, tuple or list, in order."""
    if isinstance(value, (Tensor, StandIn)):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for inner in value for tensor in flat_tensors(inner)]
    return []
