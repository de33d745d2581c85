"""Batch norms that run as one with what follows them."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmauxq.ops import learned_step_quantize
from mmauxq.ops.norm import (
    BatchNorm,
    batch_statistics,
    can_normalise,
    normalise,
    normalise_both,
    normalise_quantize,
)

RELUS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
SUMS = (
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__,
    Tensor.__radd__,
)  # fmt: skip
QUANTIZE, ADD, RELU, ALONE = 'quantize', 'add', 'relu', 'alone'
OF_Z = (
    'shape', 'ndim', 'dim', 'size', 'numel', 'dtype', 'is_floating_point',
    'device', 'is_cuda', 'requires_grad',
)  # fmt: skip
"""What a batch norm's result has in common with its input."""
SUM, RECTIFIED = 'AddBackward0', 'ReluBackward0'
Key = tuple[int, int]
"""Where a batch norm's weight lies, and which of its calls in the step."""


@dataclass(frozen=True)
class Link:
    """What follows a batch norm, and nothing else reads in between.

    Args:
        kind: ``'quantize'``, ``'add'`` or ``'relu'``: where the chain ends;
            ``'alone'`` if it is one of nothing but the batch norm.
        relu: Whether there is a ReLU: before the quantizer, after the sum.
        quantized: Whether a quantizer reads the sum, beside others.
    """

    kind: str
    relu: bool
    quantized: bool = False


@dataclass
class StandIn:
    """Stands for the result of a batch norm while it waits for what follows.

    Known functions continue it; any other gets the tensor itself.
    """

    z: Tensor
    norm: BatchNorm
    link: Link
    identity: Tensor | None = None
    rectified: bool = False
    value: Tensor | None = None
    tap: Tensor | None = None

    def tensor(self) -> Tensor:
        """What it stands for."""
        if self.value is None:
            self.value = normalise(
                self.z, self.norm, self.identity, self.rectified
            )
        return self.value

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.z if name in OF_Z else self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in RELUS and isinstance(first, StandIn):
            return first._rectify()
        if func in SUMS and len(args) == 2 and not kwargs:
            for one, other in (args, args[::-1]):
                if isinstance(one, StandIn) and one._takes(other):
                    return one._add(_plain(other))
        if func is learned_step_quantize and isinstance(first, StandIn):
            return first._quantize(*args[1:], **kwargs)
        return func(
            *map(_plain, args), **{n: _plain(v) for n, v in kwargs.items()}
        )

    def _rectify(self) -> 'Tensor | StandIn':
        if self.value is None and not self.rectified:
            if self.link.kind == QUANTIZE or self._waits_for_codes:
                return replace(self, rectified=True)
            if self.link.kind == RELU or self.identity is not None:
                return normalise(self.z, self.norm, self.identity, True)
        return F.relu(self.tensor())

    def _takes(self, other: object) -> bool:
        return (
            self.link.kind == ADD
            and self.identity is None
            and self.value is None
            and isinstance(other, (Tensor, StandIn))
            and other.shape == self.shape
            and other.dtype == self.dtype
        )

    def _add(self, other: Tensor) -> 'Tensor | StandIn':
        if other.stride() != self.z.stride():
            other = torch.empty_like(self.z).copy_(other)
        if self.link.relu or self.link.quantized:
            return replace(self, identity=other)
        return normalise(self.z, self.norm, other, False)

    @property
    def _waits_for_codes(self) -> bool:
        return self.link.quantized and self.identity is not None

    def _quantize(
        self,
        step: Tensor,
        qmin: int,
        qmax: int,
        offset: Tensor | None = None,
        grad_scale: float = 1.0,
    ) -> Tensor:
        if self.value is None and step.numel() == 1 and offset is None:
            how = (self.rectified, step, qmin, qmax, grad_scale)
            if self.link.kind == QUANTIZE:
                return normalise_quantize(self.z, self.norm, *how)
            if self._waits_for_codes:
                self.value, self.tap, codes = normalise_both(
                    self.z, self.norm, self.identity, *how
                )
                return codes
        return learned_step_quantize(
            self.tensor(), step, qmin, qmax, offset, grad_scale
        )

    def __add__(self, other: object) -> Any:
        return torch.add(self, other)  # type: ignore[call-overload]

    __radd__ = __iadd__ = __add__


def _operator(name: str) -> Callable:
    def apply(self: StandIn, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*map(_plain, args))

    return apply


# Python looks these up in the class, not through __getattr__
for _name in ('getitem', 'len', 'iter', 'neg', 'sub', 'rsub', 'mul', 'rmul',
              'truediv', 'rtruediv', 'pow', 'matmul', 'abs', 'lt', 'le', 'gt',
              'ge'):  # fmt: skip
    setattr(StandIn, f'__{_name}__', _operator(f'__{_name}__'))


def _plain(value: Any) -> Any:
    if isinstance(value, StandIn):
        return value.tensor()
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value


class Chains(TorchFunctionMode):
    """While entered, batch norms run as one with what follows them.

    A batch norm, a ReLU and a quantizer of activations are one pass over
    memory each way, and so are a batch norm, a residual sum, a ReLU and the
    quantizer of the next block; see :mod:`mmauxq.ops.norm`. The first step
    that is run inside only looks on: :meth:`plan` reads from its autograd
    graph which results of batch norms go to one place alone. From then on
    those are made where they are used.

    For feature maps with channels last in training mode, where there are
    kernels; other batch norms run as ever. Eager steps only. A forward hook on
    a batch norm or ReLU of a chain is given a stand-in, which any function of
    torch takes for the tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.links: dict[Key, Link] | None = None
        self._calls: Counter[int] = Counter()
        self._norms: dict[Key, Any] = {}
        self._quantizers: list[Any] = []

    def __enter__(self) -> 'Chains':
        self._calls.clear()
        return super().__enter__()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if any(isinstance(a, StandIn) for a in args):
            # before a mode further out, which does not know it, sees it
            return StandIn.__torch_function__(func, types, args, kwargs)
        output = func(*args, **kwargs)
        if self.links is None and func is learned_step_quantize:
            self._quantizers.append(output.grad_fn)
        return output

    def _batch_norm(
        self,
        input: Any,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        z = _plain(input)
        place = 0 if weight is None else weight.data_ptr()
        key = (place, self._calls[place])
        self._calls[place] += 1
        link = (self.links or {}).get(key)
        if (
            link is None
            or not training
            or not torch.is_grad_enabled()
            or not can_normalise(z, weight, bias)
        ):
            output = F.batch_norm(
                z, running_mean, running_var, weight, bias, training,
                momentum, eps,
            )  # fmt: skip
            if self.links is None and output.grad_fn is not None:
                self._norms[key] = output.grad_fn
            return output
        assert weight is not None and bias is not None
        norm = batch_statistics(
            z.detach(), weight, bias, running_mean, running_var, momentum, eps
        )
        if link.kind == ALONE:
            return normalise(z, norm, None, False)
        return StandIn(z, norm, link)

    def plan(
        self, outputs: Iterable[Any], tapped: Iterable[Tensor] = ()
    ) -> None:
        """Find the chains in the graph that led to ``outputs``, once.

        Args:
            outputs: Everything that the step computed and that losses may
                depend on; what is no tensor does not count.
            tapped: Tensors that were read by somebody who takes a stand-in
                for them (:func:`settled`).
        """
        if self.links is not None or not self._norms:
            return
        readers = _readers(o.grad_fn for o in outputs if isinstance(o, Tensor))
        quantizers = set(self._quantizers)
        known = {tensor.grad_fn for tensor in tapped}

        def is_quantized(node: Any) -> bool:
            """Also by the quantizer of the next block, and by no stranger."""
            found = readers.get(node, [])
            return any(reader in quantizers for reader in found) and (
                node in known
                or all(r in quantizers or r.name() == SUM for r in found)
            )

        self.links, sums = {}, set()
        for key, norm in self._norms.items():
            reader = _only(readers, norm)
            after = _only(readers, reader)
            name = reader.name() if reader else ''
            if reader in quantizers:
                self.links[key] = Link(QUANTIZE, False)
            elif name == RECTIFIED and after in quantizers:
                self.links[key] = Link(QUANTIZE, True)
            elif name == RECTIFIED:
                self.links[key] = Link(RELU, True)
            elif name == SUM and reader not in sums:
                sums.add(reader)
                relu = after is not None and after.name() == RECTIFIED
                self.links[key] = Link(
                    ADD, relu, is_quantized(after if relu else reader)
                )
            else:
                self.links[key] = Link(ALONE, False)
        self._norms, self._quantizers = {}, []


def settled(value: 'Tensor | StandIn') -> Tensor:
    """The tensor for a tap; its gradient is added where x is made."""
    if isinstance(value, StandIn):
        tensor = value.tensor()
        return tensor if value.tap is None else value.tap
    return value


def _readers(roots: Iterable[Any]) -> dict[Any, list]:
    """Node of the autograd graph -> the nodes that read its result."""
    readers: dict[Any, list] = {}
    todo = [root for root in roots if root is not None]
    known = set(todo)
    while todo:
        node = todo.pop()
        for source, _ in node.next_functions:
            if source is None:
                continue
            readers.setdefault(source, []).append(node)
            if source not in known:
                known.add(source)
                todo.append(source)
    return readers


def _only(readers: dict[Any, list], node: Any) -> Any:
    """The one reader of a node; ``None`` if there are more, or none."""
    found = readers.get(node, []) if node is not None else []
    return found[0] if len(found) == 1 else None
