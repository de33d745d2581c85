"""Batch norms fused with what follows them."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmauxq.quantizers.functional import learned_step_quantize

from .kernels import product_norm
from .kernels.dispatch import product_dtype
from .kernels.norm import (
    BatchNorm,
    batch_statistics,
    can_normalise,
    has_kernels,
    norm_add_relu_quantize,
    normalise,
    normalise_quantize,
    product_statistics,
)

INPLACE_RELUS = (torch.relu_, Tensor.relu_)
BOUNDS = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu, *INPLACE_RELUS), inf),
    F.relu6: 6.0,
}
"""ReLU -> the most that it lets through."""
SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
INPLACE_SUMS = (Tensor.add_, Tensor.__iadd__)
QUANTIZE, ADD, RELU, UNFUSED = 'quantize', 'add', 'relu', 'unfused'
METADATA = (
    'shape', 'ndim', 'dim', 'size', 'numel', 'dtype', 'is_floating_point',
    'device', 'is_cuda', 'requires_grad',
)  # fmt: skip
"""What the result of a batch norm has in common with its input."""
WIDENING = 2
"""How many times as many channels as it reads a 1x1 convolution gives for
:func:`.kernels.norm.product_statistics` to pay."""
PRODUCT_DTYPES = (torch.bfloat16,)
"""Where that pays: float32 is multiplied without tensor cores, and in float16
the products could overflow."""
SUM_NODE = 'AddBackward0'
Key = tuple[Any, int]
"""Address of a batch norm's weight or shape of a convolution's, and number of
its call in the step."""


@dataclass(frozen=True)
class Fusion:
    """What follows a batch norm, when nothing else reads what is in between.

    Args:
        kind: ``'quantize'``, ``'add'`` or ``'relu'``: the last operation of
            the fused pass; ``'unfused'`` for the batch norm alone.
        relu: Whether there is a ReLU: before the quantizer, after the sum.
        quantized: Whether a quantizer reads the sum, beside others.
    """

    kind: str
    relu: bool
    quantized: bool = False


class Deferred:
    """Stands for a tensor that is not computed until it is known what follows.

    Any function of torch takes it for the tensor, which is computed then.
    """

    z: Tensor
    """In its shape, dtype and layout."""

    def tensor(self) -> Tensor:
        """The tensor that it stands for."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.z if name in METADATA else self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = {n: _plain(v) for n, v in (kwargs or {}).items()}
        return func(*map(_plain, args), **kwargs)

    def __add__(self, other: object) -> Any:
        return torch.add(self, other)  # type: ignore[call-overload]

    __radd__ = __add__


@dataclass
class DeferredProduct(Deferred):
    """A 1x1 convolution of ``x`` with the weights ``w``, which a batch norm
    behind it may leave out; ``z`` is memory that was not written."""

    x: Tensor
    w: Tensor
    z: Tensor
    value: Tensor | None = None

    def tensor(self) -> Tensor:
        """The result of the convolution."""
        if self.value is None:
            self.value = F.conv2d(self.x, self.w)
        return self.value


@dataclass
class DeferredTensor(Deferred):
    """The result of a batch norm.

    Functions that can be fused continue it. In-place operations change this
    object, like the tensor that it stands for.
    """

    z: Tensor
    norm: BatchNorm
    fusion: Fusion
    identity: Tensor | None = None
    bound: float | None = None
    """Of the ReLU that continued it, if any did."""
    value: Tensor | None = None
    tap: Tensor | None = None

    def tensor(self) -> Tensor:
        """The result of the batch norm, and of what continued it."""
        if self.value is None:
            self.value = normalise(
                self.z, self.norm, self.identity, self.bound
            )
        return self.value

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, DeferredTensor) and first.value is None:
            bound, inplace = _relu(func, *args[1:], **kwargs)
            if bound is not None:
                found = first._rectify(bound)
                return first._become(found) if inplace else found
            if func in INPLACE_SUMS and len(args) == 2 and not kwargs:
                if first._takes(args[1]):
                    return first._become(first._add(_plain(args[1])))
        if func in SUMS and len(args) == 2 and not kwargs:
            for one, other in (args, args[::-1]):
                if isinstance(one, DeferredTensor) and one._takes(other):
                    return one._add(_plain(other))
        if func is learned_step_quantize and isinstance(first, DeferredTensor):
            return first._quantize(*args[1:], **kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def _become(self, result: 'Tensor | DeferredTensor') -> 'DeferredTensor':
        """Take the state of a result, for an operation in place."""
        if isinstance(result, Tensor):
            result = replace(self, value=result, tap=None)
        self.__dict__.update(result.__dict__)
        return self

    def _rectify(self, bound: float) -> 'Tensor | DeferredTensor':
        if self.bound is None:
            if self.fusion.kind == QUANTIZE or self._waits_for_codes():
                return replace(self, bound=bound)
            if self.fusion.kind == RELU or self.identity is not None:
                return normalise(self.z, self.norm, self.identity, bound)
        x = self.tensor()
        return F.relu(x) if bound == inf else F.hardtanh(x, 0.0, bound)

    def _takes(self, other: object) -> bool:
        return (
            self.fusion.kind == ADD
            and self.identity is None
            and self.value is None
            and self.bound is None
            and isinstance(other, (Tensor, Deferred))
            and other.shape == self.shape
            and other.dtype == self.dtype
        )

    def _add(self, other: Tensor) -> 'Tensor | DeferredTensor':
        if other.stride() != self.z.stride():
            other = torch.empty_like(self.z).copy_(other)
        if self.fusion.relu or self.fusion.quantized:
            return replace(self, identity=other)
        return normalise(self.z, self.norm, other, None)

    def _waits_for_codes(self) -> bool:
        return self.fusion.quantized and self.identity is not None

    def _quantize(
        self,
        step: Tensor,
        qmin: int,
        qmax: int,
        offset: Tensor | None = None,
        grad_scale: float = 1.0,
    ) -> Tensor:
        if self.value is None and step.numel() == 1 and offset is None:
            how = (self.bound, step, qmin, qmax, grad_scale)
            if self.fusion.kind == QUANTIZE:
                return normalise_quantize(self.z, self.norm, *how)
            if self._waits_for_codes():
                self.value, self.tap, codes = norm_add_relu_quantize(
                    self.z, self.norm, self.identity, *how
                )
                return codes
        return learned_step_quantize(
            self.tensor(), step, qmin, qmax, offset, grad_scale
        )

    def __iadd__(self, other: object) -> Any:
        return DeferredTensor.__torch_function__(
            Tensor.__iadd__, (), (self, other)
        )


def _relu(
    func: Callable, *args: Any, **kwargs: Any
) -> tuple[float | None, bool]:
    """The most that a ReLU lets through, ``None`` for any other function; and
    whether it works in place."""
    if func is F.hardtanh:
        low, high, inplace = _hardtanh(*args, **kwargs)
        return (float(high) if low == 0 else None), inplace
    if func not in BOUNDS:
        return None, False
    inplace = func in INPLACE_RELUS or kwargs.get('inplace') or any(args)
    return BOUNDS[func], bool(inplace)


def _hardtanh(
    min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> tuple[float, float, bool]:
    return min_val, max_val, inplace


def _is_relu(node: Any) -> bool:
    """Whether a node of the autograd graph is that of a ReLU."""
    name = '' if node is None else node.name()
    return name == 'ReluBackward0' or (
        name == 'HardtanhBackward0' and node._saved_min_val == 0
    )


def _operator(name: str) -> Callable:
    def apply(self: Deferred, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*map(_plain, args))

    return apply


# Python looks these up in the class, not through __getattr__
for _name in ('getitem', 'len', 'iter', 'neg', 'sub', 'rsub', 'mul', 'rmul',
              'truediv', 'rtruediv', 'pow', 'matmul', 'abs', 'lt', 'le', 'gt',
              'ge'):  # fmt: skip
    setattr(Deferred, f'__{_name}__', _operator(f'__{_name}__'))


def _plain(value: Any) -> Any:
    if isinstance(value, Deferred):
        return value.tensor()
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value


class FusedBatchNorms(TorchFunctionMode):
    """While entered, batch norms run in one pass with what follows them.

    Args:
        products: Whether batch norms behind 1x1 convolutions to more channels
            do these too, and leave out all passes over their output; see
            :mod:`.kernels.product_norm`.

    See :mod:`.kernels.norm` for what is fused. The first step that is run
    inside is only observed: :meth:`plan` reads from its autograd graph which
    results of batch norms have a single reader. From then on those are
    computed where they are used.

    Batch norms cannot be replaced by fused modules instead: the sum and the
    ReLU of a residual block are calls in the forward of the block, not
    modules of their own.

    Applies to feature maps with channels last in training mode, where there
    are kernels; other batch norms run as usual. Eager and recorded steps
    only. A forward hook on a module that was fused is given a
    :class:`Deferred`.
    """

    def __init__(self, products: bool = False) -> None:
        super().__init__()
        self.fusions: dict[Key, Fusion] | None = None
        self.products = products
        self._followed: set[Key] = set()
        self._calls: Counter[Any] = Counter()
        self._convolutions: dict[Key, Any] = {}
        self._norms: dict[Key, Any] = {}
        self._quantizers: list[Any] = []

    def __enter__(self) -> 'FusedBatchNorms':
        self._calls.clear()
        return super().__enter__()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func is F.conv2d and self.products:
            kwargs = {n: _plain(v) for n, v in kwargs.items()}
            return self._convolution(*_plain(args), **kwargs)
        if any(isinstance(a, Deferred) for a in args):
            # before outer modes see it, which do not know the class
            return DeferredTensor.__torch_function__(func, types, args, kwargs)
        output = func(*args, **kwargs)
        if self.fusions is None and func is learned_step_quantize:
            self._quantizers.append(output.grad_fn)
        return output

    def _convolution(
        self, input: Tensor, weight: Tensor, *args: Any, **how: Any
    ) -> Any:
        dtype = product_dtype(input)
        fits = _is_product(input, weight, *args, **how)
        if not (fits and torch.is_grad_enabled() and dtype in PRODUCT_DTYPES):
            return F.conv2d(input, weight, *args, **how)
        place = tuple(weight.shape)
        key = (place, self._calls[place])
        self._calls[place] += 1
        if key in self._followed:
            n, _, height, width = input.shape
            z = torch.empty(
                (n, len(weight), height, width), dtype=dtype,
                device=input.device, requires_grad=True,
                memory_format=torch.channels_last,
            )  # fmt: skip
            return DeferredProduct(input.to(dtype), weight.to(dtype), z)
        output = F.conv2d(input, weight, *args, **how)
        if self.fusions is None:
            self._convolutions[key] = output.grad_fn
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
        z = input.z if isinstance(input, DeferredProduct) else _plain(input)
        place = 0 if weight is None else weight.data_ptr()
        key = (place, self._calls[place])
        self._calls[place] += 1
        fusion = (self.fusions or {}).get(key)
        fits = training and torch.is_grad_enabled()
        if fusion is None or not fits or not can_normalise(z, weight, bias):
            output = F.batch_norm(
                _plain(input), running_mean, running_var, weight, bias,
                training, momentum, eps,
            )  # fmt: skip
            if self.fusions is None and output.grad_fn is not None:
                self._norms[key] = output.grad_fn
            return output
        assert weight is not None and bias is not None
        how = weight, bias, running_mean, running_var, momentum, eps
        if isinstance(input, DeferredProduct):
            norm = product_statistics(input.x, input.w, z, *how)
        else:
            norm = batch_statistics(z.detach(), *how)
        if fusion.kind == UNFUSED:
            return normalise(z, norm, None, None)
        return DeferredTensor(z, norm, fusion)

    def plan(
        self, outputs: Iterable[Any], tapped: Iterable[Tensor] = ()
    ) -> None:
        """Find what to fuse in the graph that led to ``outputs``, all that
        losses may depend on, once; ``tapped`` was materialized."""
        if self.fusions is not None or not self._norms:
            return
        readers = _readers(o.grad_fn for o in outputs if isinstance(o, Tensor))
        quantizers = set(self._quantizers)
        known = {tensor.grad_fn for tensor in tapped}

        def is_quantized(node: Any) -> bool:
            """Whether all readers are the quantizer of the next block, sums
            and taps."""
            found = readers.get(node, [])
            return any(reader in quantizers for reader in found) and (
                node in known
                or all(r in quantizers or r.name() == SUM_NODE for r in found)
            )

        self.fusions, sums = {}, set()
        for key, norm in self._norms.items():
            reader = _only(readers, norm)
            after = _only(readers, reader)
            name = reader.name() if reader else ''
            fusion = Fusion(UNFUSED, False)
            if reader in quantizers:
                fusion = Fusion(QUANTIZE, False)
            elif _is_relu(reader):
                kind = QUANTIZE if after in quantizers else RELU
                fusion = Fusion(kind, True)
            elif name == SUM_NODE and reader not in sums:
                sums.add(reader)
                relu = _is_relu(after)
                quantized = is_quantized(after if relu else reader)
                fusion = Fusion(ADD, relu, quantized)
            self.fusions[key] = fusion
        norms = set(self._norms.values())
        self._followed = {
            key
            for key, node in self._convolutions.items()
            if _only(readers, node) in norms
        }
        self._norms, self._quantizers, self._convolutions = {}, [], {}


def _is_product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Whether a convolution is a product of pixels with weights, and gives
    many more channels than it reads."""
    return (
        input.dim() == 4
        and bias is None
        and all(
            v in (1, (1, 1), [1, 1]) for v in (stride, (*weight.shape[2:],))
        )
        and padding in (0, (0, 0), [0, 0])
        and groups == 1
        and weight.shape[0] >= WIDENING * weight.shape[1]
        and product_norm.takes(
            input.numel() // input.shape[1], weight.shape[1]
        )
        and input.is_contiguous(memory_format=torch.channels_last)
        and has_kernels(input)
    )


def materialize(value: 'Tensor | DeferredTensor') -> Tensor:
    """The tensor for a tap: an alias of the result, so that its gradient is
    added in the fused backward pass."""
    tap = value.tap if isinstance(value, DeferredTensor) else None
    return _plain(value) if tap is None else tap


def _readers(roots: Iterable[Any]) -> dict[Any, list]:
    """Node of the autograd graph -> the nodes that read its result."""
    readers: dict[Any, list] = {}
    todo, known = list(roots), {None}
    while todo:
        node = todo.pop()
        if node in known:
            continue
        known.add(node)
        for source, _ in node.next_functions:
            readers.setdefault(source, []).append(node)
            todo.append(source)
    return readers


def _only(readers: dict[Any, list], node: Any) -> Any:
    """The one reader of a node; ``None`` if there are more, or none."""
    found = [] if node is None else readers.get(node, [])
    return found[0] if len(found) == 1 else None
