"""Taps: reading the output of a block while the network runs."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import is_tensor_like

from mmauxq.errors import UsageError
from mmauxq.layers.weight_uses import tensors_in

STEM = 'stem'
"""Name of the tensor that enters the first tapped block."""

IMAGE = 'image'
"""Name of the preprocessed images."""

MAP = 'map'
CHANNELS_LAST = 'channels_last'
TOKENS = 'tokens'


@dataclass(frozen=True)
class Tap:
    """A place where F is read, and the shape of the tensor there.

    Args:
        name: Of the module whose output is read; ``'stem'`` for the input of
            the first tapped block, ``'image'`` for that of F. A module that
            returns several tensors has a tap for each, ``'name:0'``, ...
        shape: Of one sample: (C, H, W) in the layout ``'map'``, (H, W, C) in
            ``'channels_last'``, (L, C) in ``'tokens'``.
    """

    name: str
    shape: tuple[int, ...]
    layout: str = MAP

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[0] if self.layout == MAP else self.shape[-1]

    @property
    def size(self) -> tuple[int, ...]:
        """(H, W), or (L,) of tokens."""
        return self.shape[1:] if self.layout == MAP else self.shape[:-1]


def parts_by_name(name: str, parts: Sequence[int]) -> dict[str, int]:
    """Name of a tap -> which of the tensors of the module ``name`` it is."""
    return {name if len(parts) == 1 else f'{name}:{i}': i for i in parts}


def check_tap(
    place: str, name: str, kind: str, grad: bool, features: bool
) -> None:
    """Raise a UsageError about ``place`` if a module was run without gradients
    or returned, in a value of class ``kind``, no features."""
    if not grad:
        raise UsageError(
            f'{place}: {name} runs inside activation checkpointing, where no '
            'gradient leads back from it; tap the checkpointed block itself, '
            'or set with_cp=False'
        )
    if not features:
        raise UsageError(
            f'{place}: expected feature maps or tokens from {name}, got a '
            f'{kind}; tap another module'
        )


def layout_of(shape: Sequence[int], image: Sequence[int]) -> str:
    """The layout of a tensor whose samples have this ``shape``.

    Of three axes, the two whose ratio is nearest to H / W of the ``image``,
    (C, H, W), are the spatial ones.
    """

    def distortion(height: int, width: int) -> float:
        ratio = height * image[2] / (width * image[1])
        return max(ratio, 1 / ratio)

    if len(shape) == 2:
        return TOKENS
    if len(shape) == 3 and distortion(*shape[:2]) < distortion(*shape[1:]):
        return CHANNELS_LAST
    return MAP


class TapRecorder:
    """Keeps the outputs of modules while it is entered.

    Two things invalidate what a hook sees when its module returns, and both
    are refused with an error: a later in-place operation that overwrites it (a
    residual sum, an in-place activation), unless it is named in
    ``overwritten`` and therefore copied; and activation checkpointing around
    the module, where no gradient leads back from it.

    Args:
        model: The network that contains the modules.
        names: Of the modules, in any order.
        stem: Whether to keep the input of the module that runs first, too.
        overwritten: Names of taps that are known to be overwritten later.
        parts: Name -> which of the tensors in a tuple or list are kept; of
            the stem the first by default.
        with_grad: Whether a gradient must lead back from them.

    Attributes:
        active: Whether it is entered.
        materialize: Turns what was kept into tensors, if modules may return
            an object whose tensor is computed later.
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
        self.parts = {STEM: (0,), **(parts or {})}
        self.with_grad = with_grad
        self.active = False
        self.materialize: Callable[[Any], Tensor] | None = None
        # by name, each time: conversion and SyncBN replace modules
        self._model = model
        self._outputs: dict[str, Any] = {}
        self._versions: dict[str, int] = {}
        self._ran: set[str] = set()
        self._hooks = ExitStack()
        self._needs_grad = False

    def __enter__(self) -> 'TapRecorder':
        self._outputs, self._versions, self._ran = {}, {}, set()
        self.active = True
        self._needs_grad = self.with_grad and torch.is_grad_enabled()
        for name in self.names:
            module = self._model.get_submodule(name)
            if self.stem:
                handle = module.register_forward_pre_hook(
                    self._keep_input, with_kwargs=True
                )
                self._hooks.enter_context(handle)
            handle = module.register_forward_hook(
                lambda _, args, output, name=name: self._keep(name, output)
            )
            self._hooks.enter_context(handle)
        return self

    def __exit__(self, *exc: object) -> None:
        # checkpointed blocks run again in the backward pass, unrecorded
        self._hooks.close()
        self.active = False

    def _keep_input(
        self, module: nn.Module, args: tuple, kwargs: dict
    ) -> None:
        if not self._ran:
            inputs = args or tuple(kwargs.values())
            self._keep(STEM, inputs[0] if len(inputs) == 1 else inputs)

    def _keep(self, name: str, value: object) -> Tensor | None:
        """What takes the place of ``value``, if anything does."""
        check_tap(
            'taps', name, type(value).__name__,
            torch.is_grad_enabled() or not self._needs_grad,
            is_tensor_like(value) or name in self.parts,
        )  # fmt: skip
        self._ran.add(name)
        outputs = {name: value}
        if not is_tensor_like(value):
            tensors, parts = tensors_in(value), self.parts[name]
            keys = parts_by_name(name, parts)
            outputs = {key: tensors[i] for key, i in keys.items()}
        for key, tensor in outputs.items():
            if key in self.overwritten:
                tensor = self._tensor(tensor).clone()
            self._outputs[key] = tensor
            if isinstance(tensor, Tensor):
                self._versions[key] = tensor._version
        return None

    def _tensor(self, value: Any) -> Tensor:
        return value if self.materialize is None else self.materialize(value)

    def restart(self) -> None:
        """Forget what was kept: the network runs once more."""
        self.release()
        self._ran.clear()

    def release(self) -> None:
        """Drop what was kept: autograd alone decides what stays in memory."""
        # Cleared, not replaced: a compiled step returns what was put into a
        # dictionary that existed before it.
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
        """Name -> tensor, in the order in which the modules ran; a UsageError
        if one was overwritten, or a module did not run."""
        # a compiled step was checked when it ran eagerly
        changed = [] if torch.compiler.is_compiling() else self.changed()
        if changed:
            raise UsageError(
                f'taps: the output of {changed[0]} is overwritten in place by '
                'a later operation; tap another module, or make that '
                'operation out of place'
            )
        missing = [name for name in self.names if name not in self._ran]
        if missing:
            raise UsageError(
                f'taps: {missing[0]} did not run in this forward pass'
            )
        return {name: self._tensor(v) for name, v in self._outputs.items()}
