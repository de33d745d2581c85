"""Reading the output of a block while the network runs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmauxq.errors import UsageError
from mmauxq.layers.policy import match

STEM = 'stem'
"""Key of the tensor that enters the first tapped block."""


@dataclass(frozen=True)
class Tap:
    """A place to read, and what is found there.

    Args:
        name: Name of the module whose output is read; ``'stem'`` for the
            input of the first tapped block.
        shape: Of one sample, without the batch axis: (C, H, W).
    """

    name: str
    shape: tuple[int, ...]


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the repeated blocks of ``model.backbone``.

    A block is a child of a Sequential or ModuleList, has children itself and
    is not inside another block; so the stages of a ResNet are passed through
    and their residual blocks are found.
    """
    blocks: list[str] = []

    def visit(prefix: str, module: nn.Module) -> None:
        inside = isinstance(module, (nn.Sequential, nn.ModuleList))
        for name, child in module.named_children():
            path = f'{prefix}.{name}'
            is_list = isinstance(child, (nn.Sequential, nn.ModuleList))
            if inside and not is_list and any(True for _ in child.children()):
                blocks.append(path)
            else:
                visit(path, child)

    visit('backbone', model.backbone)
    return blocks


def resolve_taps(model: nn.Module, taps: str | Sequence[str]) -> list[str]:
    """Module names that ``taps`` stands for.

    Args:
        model: An image classifier.
        taps: ``'auto'`` for :func:`find_blocks`, or shell patterns of module
            names such as ``'backbone.layer*.*'``. A ``*`` does not cross a
            dot, so that the pattern above means blocks, not their layers.

    Raises:
        UsageError: If nothing is found; the message lists what exists.
    """
    blocks = find_blocks(model)
    if taps == 'auto':
        if not blocks:
            raise UsageError(
                "taps='auto' finds no repeated block in "
                f'{type(model.backbone).__name__}; name the modules to tap'
            )
        return blocks
    names = [name for name, _ in model.named_modules() if name]
    chosen: list[str] = []
    for pattern in [taps] if isinstance(taps, str) else taps:
        depth = pattern.count('.')
        level = [name for name in names if name.count('.') == depth]
        try:
            found = match(pattern, level or names, 'taps:')
        except UsageError:
            found = (
                match(pattern, blocks, 'taps:')
                if blocks
                else match(pattern, names, 'taps:')
            )
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
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        stem: bool = False,
        overwritten: Sequence[str] = (),
    ) -> None:
        self.names = list(names)
        self.stem = stem
        self.overwritten = set(overwritten)
        # by name, each time: conversion and SyncBN replace modules
        self._model = model
        self._outputs: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        self._grad = False

    def __enter__(self) -> 'TapRecorder':
        self._outputs, self._versions = {}, {}
        self._grad = torch.is_grad_enabled()
        for name in self.names:
            module = self._model.get_submodule(name)
            if self.stem:
                self._handles.append(
                    module.register_forward_pre_hook(self._keep_input)
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

    def _keep_input(self, module: nn.Module, args: tuple) -> None:
        if not self._outputs:
            self._keep(STEM, args[0] if args else None)

    def _keep(self, name: str, value: object) -> None:
        if not isinstance(value, Tensor):
            raise UsageError(
                f'taps: {name} gives a {type(value).__name__}; '
                'only modules that give one tensor can be tapped'
            )
        if self._grad and not torch.is_grad_enabled():
            raise UsageError(
                f'taps: {name} runs inside activation checkpointing, no '
                'gradient leads back from it; tap the checkpointed block '
                'itself, or set with_cp=False'
            )
        if name in self.overwritten:
            value = value.clone()
        self._outputs[name] = value
        self._versions[name] = value._version

    def changed(self) -> list[str]:
        """Names whose tensor was overwritten after it was read."""
        return [
            name
            for name, value in self._outputs.items()
            if value._version != self._versions[name]
        ]

    def outputs(self) -> dict[str, Tensor]:
        """Name -> tensor, in the order in which the modules ran.

        Raises:
            UsageError: If one was overwritten, or a module did not run.
        """
        changed = self.changed()
        if changed:
            raise UsageError(
                f'taps: the output of {changed[0]} is '
                'overwritten in place by a later operation; tap '
                'another module, or make that operation '
                'out of place'
            )
        missing = [name for name in self.names if name not in self._outputs]
        if missing:
            raise UsageError(
                f'taps: {missing[0]} did not run in this forward pass'
            )
        return dict(self._outputs)
