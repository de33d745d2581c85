"""Less memory for the backward pass: what can be made again is not kept."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from mmauxq.errors import UsageError
from mmauxq.ops import learned_step_quantize
from mmauxq.ops.codes import Codes
from mmauxq.ops.dispatch import is_dense
from mmauxq.ops.norm import (
    BatchNorm,
    normalise,
    normalise_both,
    normalise_quantize,
)

from .quantized import PRODUCTS

LEVELS = ('codes', 'recompute')
MOST_PRODUCTS = 1
"""How many products may be computed again for one tensor, at the most."""


COMPILER_SETTINGS: dict[str, dict[str, Any]] = {
    'codes': dict(aggressive_recomputation=True),
    'recompute': dict(activation_memory_budget=0.1),
}
"""What a level means to ``torch.compile``, which computes again by itself."""


def compiling_for(level: str | None) -> AbstractContextManager:
    """While entered, what is compiled keeps less for its backward pass.

    Args:
        level: As of :class:`LessMemory`; ``None`` leaves it to the compiler.
    """
    if level is None:
        return nullcontext()
    from torch._functorch import config

    return config.patch(**COMPILER_SETTINGS[level])


Call = tuple[Callable, tuple, dict]


def _same(func: Callable) -> Callable[..., Call]:
    return lambda *args, **kwargs: (func, args, kwargs)


def _out_of_place(func: Callable) -> Callable[..., Call]:
    """Also of the form that works in place, as ``func(x, True)`` or so."""

    def call(*args: Any, **kwargs: Any) -> Call:
        kwargs.pop('inplace', None)
        return func, tuple(a for a in args if not isinstance(a, bool)), kwargs

    return call


def _batch_norm(*args: Any, **kwargs: Any) -> Call:
    """Without running statistics, which must not be updated twice."""
    names = ('running_mean', 'running_var', 'weight', 'bias', 'training')
    names = ('input', *names, 'momentum', 'eps')
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get('training'):
        given.update(running_mean=None, running_var=None)
    return F.batch_norm, (), given


CHEAP: dict[Callable, Callable[..., Call]] = {
    F.batch_norm: _batch_norm,
    F.layer_norm: _same(F.layer_norm),
    F.relu: _out_of_place(F.relu),
    F.relu6: _out_of_place(F.relu6),
    F.hardtanh: _out_of_place(F.hardtanh),
    F.silu: _out_of_place(F.silu),
    F.hardswish: _out_of_place(F.hardswish),
    F.gelu: _same(F.gelu),
    torch.relu: _same(torch.relu),
    torch.relu_: _same(torch.relu),
    Tensor.relu: _same(torch.relu),
    Tensor.relu_: _same(torch.relu),
    Tensor.float: _same(Tensor.float),
    learned_step_quantize: _same(learned_step_quantize),
    normalise: _same(normalise),
    normalise_quantize: _same(normalise_quantize),
}
"""What is computed again at any level, and how it is called then."""


def _codes(
    output: Tensor,
    x: Tensor,
    step: Tensor,
    qmin: int,
    qmax: int,
    offset: Tensor | None = None,
    grad_scale: float = 1.0,
) -> Codes:
    """Of the result of ``learned_step_quantize``, which comes first."""
    with torch.no_grad():
        return Codes(
            output.detach(),
            step.detach(),
            qmin,
            qmax,
            None if offset is None else offset.detach(),
        )


def _normalised_codes(
    output: Tensor,
    z: Tensor,
    norm: BatchNorm,
    relu: bool,
    step: Tensor,
    qmin: int,
    qmax: int,
    grad_scale: float,
) -> Codes:
    """Likewise of ``normalise_quantize``."""
    return _codes(output, z, step, qmin, qmax)


CODES: dict[Callable, Callable[..., Codes]] = {
    learned_step_quantize: _codes,
    normalise_quantize: _normalised_codes,
}
"""What ends in codes, and how they are found in its result."""


SUMS: dict[Callable, Callable[..., Call]] = dict.fromkeys(
    (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__),
    _same(torch.add),
)


def _maxima(x: Tensor, kernel_size: Any, **how: Any) -> Tensor:
    """Where the maxima of a pooling lie, int64."""
    return F.max_pool2d(x, kernel_size, **how, return_indices=True)[1]


SEVERAL: dict[Callable, str] = {
    normalise_both: '_normalise_both',
    F.max_pool2d: '_max_pool',
}
"""What makes several tensors that are kept -> the method that knows them."""


class _Kept:
    """A tensor that stays in memory."""

    products = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.version = tensor._version

    @property
    def is_stale(self) -> bool:
        return self.tensor._version != self.version

    def is_same(self, other: Tensor) -> bool:
        return self.tensor.data_ptr() == other.data_ptr()

    def peek(self) -> Tensor:
        if self.is_stale:
            raise UsageError(
                'memory: a tensor of shape '
                f'{tuple(self.tensor.shape)} was overwritten in place before '
                'the backward pass, which needs it; set model.memory=None'
            )
        return self.tensor


class _Recipe:
    """How to make a tensor again."""

    def __init__(self, func: Callable, args: list, kwargs: dict) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.handles = [a for a in [*args, *kwargs.values()] if _is_handle(a)]
        self.products = sum(handle.products for handle in self.handles)
        self.uses = 0
        self.value: Tensor | None = None

    def made(self, output: Tensor) -> None:
        """What it shall be like, and how it was computed."""
        self.shape, self.strides = output.shape, output.stride()
        device = output.device.type
        self.autocast = dict(
            device_type=device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
        )

    def peek(self) -> Tensor:
        """The tensor, for the sake of another one."""
        if self.value is not None:
            return self.value
        with (
            torch.no_grad(),
            torch.autocast(**self.autocast, cache_enabled=False),
        ):
            value = self.func(
                *(a.peek() if _is_handle(a) else a for a in self.args),
                **{
                    name: a.peek() if _is_handle(a) else a
                    for name, a in self.kwargs.items()
                },
            )
        if value.stride() != self.strides:
            value = torch.empty_strided(
                value.shape,
                self.strides,
                dtype=value.dtype,
                device=value.device,
            ).copy_(value)
        if self.uses > 0:
            self.value = value
        return value

    def take(self) -> Tensor:
        """The tensor, for the backward of an operation that saved it."""
        value = self.peek()
        self.uses -= 1
        if self.uses <= 0:
            self.value = None
        return value


class _View:
    """Some elements of a tensor that can be made again."""

    def __init__(self, recipe: _Recipe, like: Tensor) -> None:
        self.recipe, self.products = recipe, recipe.products
        self.shape, self.strides = like.shape, like.stride()
        self.offset = like.storage_offset()

    def _of(self, value: Tensor) -> Tensor:
        return value.as_strided(self.shape, self.strides, self.offset)

    def peek(self) -> Tensor:
        return self._of(self.recipe.peek())

    def take(self) -> Tensor:
        return self._of(self.recipe.take())


def _is_handle(value: object) -> bool:
    return isinstance(value, (_Kept, _Recipe, _View))


class _Slot:
    """What autograd holds in the place of a tensor."""

    def __init__(self, content: 'Tensor | _Recipe | _View') -> None:
        self.content = content


class LessMemory(TorchFunctionMode):
    """While entered, operations save recipes instead of tensors.

    Gradients are those of the plain network to the bit, the gradient of the
    steps too: every tensor that the backward pass asks for is computed once
    more by the same operation from the same numbers, lives as long as it is
    needed, and goes.

    * ``'codes'``: quantized tensors, normalisations, activations and sums are
      made again; the results of products are kept. Nothing that costs more
      than reading memory is done twice.
    * ``'recompute'``: results of products are made again as well, from inputs
      that are kept as 4- or 8-bit codes. Every second sum in a chain of
      residual blocks is kept.

    What it does not know it keeps, as autograd would. Eager steps only; for
    compiled ones there is :func:`compiling_for`.

    Args:
        level: ``'codes'`` or ``'recompute'``.

    Raises:
        UsageError: If it is neither, and in the backward pass if a tensor was
            overwritten in place by an operation that it does not know.
    """

    def __init__(self, level: str) -> None:
        super().__init__()
        if level not in LEVELS:
            raise UsageError(
                f'memory={level!r}; allowed are {list(LEVELS)} and None'
            )
        self.level = level
        self._known: dict[int, tuple[StorageWeakRef, int, _Recipe]] = {}
        self._fresh: list[_Slot] = []
        self._hooks = ExitStack()

    def __enter__(self) -> 'LessMemory':
        super().__enter__()
        self._hooks.enter_context(
            torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        )
        return self

    def __exit__(self, *exc: Any) -> None:
        self._hooks.close()
        self._known, self._fresh = {}, []
        super().__exit__(*exc)

    def _pack(self, tensor: Tensor) -> _Slot:
        slot = _Slot(tensor)
        self._replace(slot)
        if slot.content is tensor:
            # it may be the result of the operation that runs just now
            self._fresh.append(slot)
        return slot

    def _replace(self, slot: _Slot) -> None:
        handle = self._find(slot.content)
        if handle is not None:
            slot.content = handle
            recipe = handle.recipe if isinstance(handle, _View) else handle
            recipe.uses += 1

    def _find(self, tensor: Any) -> '_Recipe | _View | None':
        """How the tensor can be made again, if it is known."""
        if not isinstance(tensor, Tensor) or not tensor.numel():
            return None
        entry = self._known.get(tensor.untyped_storage().data_ptr())
        # a storage that died may have left its address to another
        if entry is None or entry[0].expired() or entry[1] != tensor._version:
            return None
        recipe = entry[2]
        if tensor.shape == recipe.shape and tensor.stride() == recipe.strides:
            return recipe
        return _View(recipe, tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        form = CHEAP.get(func) or SUMS.get(func)
        if func in PRODUCTS and self.level == 'recompute':
            form = _same(func)
        self._fresh.clear()
        several = SEVERAL.get(func)
        if not torch.is_grad_enabled() or not (form or several):
            return func(*args, **kwargs)
        if several:
            output = getattr(self, several)(*args, **kwargs)
        else:
            # before it runs: it may overwrite what it is given
            again = self._recipe(*form(*args, **kwargs))
            output = func(*args, **kwargs)
            self._remember(func, again, output, args, kwargs)
        for slot in self._fresh:
            self._replace(slot)
        self._fresh.clear()
        return output

    def _normalise_both(
        self, z: Tensor, norm: BatchNorm, identity: Tensor, relu: bool,
        step: Tensor, *how: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Like the two operations that it stands for."""
        again = self._recipe(normalise, (z, norm, identity, relu), {})
        x, spare, codes = normalise_both(z, norm, identity, relu, step, *how)
        self._remember(normalise, again, x, (), {})
        qmin, qmax, grad_scale = how
        args = (x, step, qmin, qmax, None, grad_scale)
        again = self._recipe(learned_step_quantize, args, {})
        self._remember(learned_step_quantize, again, codes, args, {})
        return x, spare, codes

    def _max_pool(
        self, x: Tensor, kernel_size: Any, return_indices: bool, **how: Any
    ) -> Tensor:
        """Where the maxima lie takes four times their own memory.

        One that shall return it is another function for torch.
        """
        again = self._recipe(_maxima, (x, kernel_size), how)
        values, places = F.max_pool2d(
            x, kernel_size, **how, return_indices=True
        )
        self._remember(_maxima, again, places, (), {})
        return values

    def _recipe(
        self, func: Callable, args: Sequence[Any], kwargs: dict
    ) -> '_Recipe':
        return _Recipe(
            func,
            [self._handle(a) for a in args],
            {name: self._handle(a) for name, a in kwargs.items()},
        )

    def _remember(
        self, func: Callable, recipe: '_Recipe', output: Tensor,
        args: Sequence[Any], kwargs: dict,
    ) -> None:  # fmt: skip
        """That ``func`` gave ``output``, and how it is had again."""
        if func in CODES and recipe.products and is_dense(output):
            # the chain ends here: the next product begins with codes
            codes = CODES[func](output, *args, **kwargs)
            recipe = _Recipe(codes.value, [], {})
        recipe.products += func in PRODUCTS
        recipe.made(output)
        if self._is_worth_it(func, recipe, output):
            storage = output.untyped_storage()
            self._known[storage.data_ptr()] = (
                StorageWeakRef(storage),
                output._version,
                recipe,
            )

    def _handle(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return self._find(value) or _Kept(value)

    def _is_worth_it(
        self, func: Any, recipe: '_Recipe', output: Tensor
    ) -> bool:
        inputs = [h for h in recipe.handles if isinstance(h, _Kept)]
        if any(h.is_stale or h.is_same(output) for h in inputs):
            return False  # overwritten just now, or passed through
        if func in SUMS and len(inputs) == len(recipe.handles):
            return False  # it would take two tensors to make one
        return (
            recipe.products <= MOST_PRODUCTS
            and is_dense(output)
            and output.numel() * output.element_size()
            == output.untyped_storage().nbytes()
        )


def _unpack(slot: _Slot) -> Tensor:
    content = slot.content
    return content if isinstance(content, Tensor) else content.take()
