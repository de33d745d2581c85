"""What the modules of a network take and return in a training pass."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from mmauxq.layers.weight_uses import tensors_in

from .probing import probing


@dataclass
class ModuleCall:
    """The last call of a module.

    Args:
        inputs: Tensors among its arguments.
        outputs: Tensors that it returned.
        versions: ``Tensor._version`` of each when it was returned.
        kind: Name of the class of what it returned.
        grad: Whether gradients were recorded, as they are not inside of
            activation checkpointing.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    versions: list[int]
    kind: str
    grad: bool


class TrainingPass:
    """A forward pass with gradients, of which every module call is kept.

    Args:
        model: A float image classifier; left as it was.
        images: (N, C, H, W).

    Attributes:
        calls: Name of a module -> its last call, in the order in which the
            modules first returned.
        first_inputs: Name of a module -> the tensors in each argument of its
            first call, and the version of each tensor at that time.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        # the learned scales of a frozen backbone will send gradients, too
        self.images = images.detach().requires_grad_()
        self.model = model
        self.calls: dict[str, ModuleCall] = {}
        self.first_inputs: dict[str, tuple[list[list[Tensor]], list[int]]] = {}
        with ExitStack() as stack:
            for name, module in model.named_modules():
                for register, hook in (
                    (module.register_forward_pre_hook, self._before),
                    (module.register_forward_hook, self._after),
                ):
                    handle = register(partial(hook, name), with_kwargs=True)
                    stack.enter_context(handle)
            stack.enter_context(probing(model, training=True))
            model(self.images, mode='tensor')

    def _before(
        self, name: str, module: nn.Module, args: tuple, kwargs: dict
    ) -> None:
        # Lists are copied: they may grow later, as in a DenseNet.
        arguments = [tensors_in(x) for x in args or kwargs.values()]
        versions = [t._version for tensors in arguments for t in tensors]
        self.first_inputs.setdefault(name, (arguments, versions))

    def _after(
        self,
        name: str,
        module: nn.Module,
        args: tuple,
        kwargs: dict,
        output: object,
    ) -> None:
        outputs = tensors_in(output)
        self.calls[name] = ModuleCall(
            tensors_in(args or tuple(kwargs.values())),
            outputs,
            [t._version for t in outputs],
            type(output).__name__,
            torch.is_grad_enabled(),
        )

    def are_chained(self, names: list[str]) -> bool:
        """Whether each module takes a tensor that the one before returned."""
        if not self.calls.keys() >= set(names):
            return False
        return all(
            set(self.calls[after].inputs) & set(self.calls[before].outputs)
            for before, after in pairwise(names)
        )

    def is_feature(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is floating point with one row per image."""
        return (
            tensor.is_floating_point()
            and tensor.dim() > 1
            and tensor.shape[0] == len(self.images)
        )

    def features(self, name: str) -> tuple[int, ...]:
        """Which of the tensors that a module returns are features."""
        outputs = self.calls[name].outputs
        return tuple(i for i, t in enumerate(outputs) if self.is_feature(t))

    def is_usable(self, name: str) -> bool:
        """Whether a module returns features that send back a gradient."""
        if name not in self.calls or not self.calls[name].grad:
            return False
        features = [self.calls[name].outputs[i] for i in self.features(name)]
        return any(x.dim() in (3, 4) and x.requires_grad for x in features)
