"""Less memory: tensors are recomputed in the backward pass."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from mmauxq.errors import UsageError
from mmauxq.layers.weight_uses import PRODUCTS
from mmauxq.quantizers.functional import learned_step_quantize

from .kernels.dispatch import is_dense
from .kernels.norm import (
    BatchNorm,
    norm_add_relu_quantize,
    normalise,
    normalise_quantize,
)
from .kernels.packed import PackedTensor, has_codes

Call = tuple[Callable, tuple, dict]


def same_call(func: Callable) -> Callable[..., Call]:
    return lambda *args, **kwargs: (func, args, kwargs)


def _out_of_place(func: Callable) -> Callable[..., Call]:
    """``func`` out of place, also where it was called with ``inplace``."""

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


_RELUS = (torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_WITH_INPLACE = (F.relu, F.relu6, F.hardtanh, F.silu, F.hardswish)
_OTHERS = (
    *(F.layer_norm, F.gelu, Tensor.float),
    *(learned_step_quantize, normalise, normalise_quantize),
)
CHEAP: dict[Callable, Callable[..., Call]] = {
    F.batch_norm: _batch_norm,
    **dict.fromkeys(_RELUS, same_call(torch.relu)),
    **{func: _out_of_place(func) for func in _WITH_INPLACE},
    **{func: same_call(func) for func in _OTHERS},
}
"""Recomputed at any level: function -> the call that recomputes it."""


CODES: dict[Callable, int] = {learned_step_quantize: 1, normalise_quantize: 3}
"""Functions whose result is quantized -> where step, qmin and qmax stand among
their arguments."""

SUMS: dict[Callable, Callable[..., Call]] = dict.fromkeys(
    (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__),
    same_call(torch.add),
)


def max_indices(x: Tensor, kernel_size: Any, **how: Any) -> Tensor:
    """Indices of the maxima of a pooling, int64."""
    return F.max_pool2d(x, kernel_size, **how, return_indices=True)[1]


SEVERAL: dict[Callable, str] = {
    norm_add_relu_quantize: '_norm_add_relu_quantize',
    F.max_pool2d: '_max_pool',
}
"""Functions that save several results -> the method that handles them."""

MOST_PRODUCTS = 1
"""How many products may be recomputed for one tensor at most."""

COMPILER_SETTINGS: dict[str, dict[str, Any]] = {
    'codes': dict(aggressive_recomputation=True),
    'recompute': dict(activation_memory_budget=0.1),
}
"""What a level means to ``torch.compile``, which recomputes by itself."""
LEVELS = tuple(COMPILER_SETTINGS)


def compiling_for(level: str | None) -> AbstractContextManager:
    """While entered, what is compiled keeps less for its backward pass; see
    :class:`Recompute`. ``None`` leaves it to the compiler."""
    if level is None:
        return nullcontext()
    from torch._functorch import config

    return config.patch(**COMPILER_SETTINGS[level])


class _Saved:
    """A tensor that stays in memory."""

    products = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.version = tensor._version

    def is_stale(self) -> bool:
        return self.tensor._version != self.version

    def value(self) -> Tensor:
        if self.is_stale():
            raise UsageError(
                'model.speed.memory: a tensor of shape '
                f'{tuple(self.tensor.shape)} was overwritten in place before '
                'the backward pass, which needs it; set it to None'
            )
        return self.tensor


class _Recomputed:
    """A tensor that is recomputed when it is needed."""

    def __init__(self, func: Callable, args: Sequence, kwargs: dict) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        given = (*args, *kwargs.values())
        self.handles = [a for a in given if isinstance(a, HANDLES)]
        self.products = sum(handle.products for handle in self.handles)
        self.uses = 0
        self.cached: Tensor | None = None

    def describe(self, output: Tensor) -> None:
        """Note the metadata of the tensor, and the autocast mode."""
        self.shape, self.strides = output.shape, output.stride()
        device = output.device.type
        self.autocast = dict(
            device_type=device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
        )

    def value(self, consume: bool = False) -> Tensor:
        """The tensor, to ``consume`` in one of the operations that saved it,
        or to recompute another one."""
        value = self._compute() if self.cached is None else self.cached
        self.uses -= consume
        self.cached = value if self.uses > 0 else None
        return value

    def _compute(self) -> Tensor:
        with (
            torch.no_grad(),
            torch.autocast(**self.autocast, cache_enabled=False),
        ):
            value = self.func(
                *map(_value, self.args),
                **{name: _value(a) for name, a in self.kwargs.items()},
            )
        if value.stride() == self.strides:
            return value
        return value.new_empty_strided(value.shape, self.strides).copy_(value)


class _View:
    """A view of a tensor that is recomputed."""

    def __init__(self, recipe: _Recomputed, like: Tensor) -> None:
        self.recipe, self.products = recipe, recipe.products
        self.place = like.shape, like.stride(), like.storage_offset()

    def value(self, consume: bool = False) -> Tensor:
        return self.recipe.value(consume).as_strided(*self.place)


HANDLES = (_Saved, _Recomputed, _View)


def _value(argument: Any) -> Any:
    return argument.value() if isinstance(argument, HANDLES) else argument


class _Placeholder:
    """What autograd saves in the place of a tensor."""

    def __init__(self, content: Tensor | _Recomputed | _View) -> None:
        self.content = content
        # autograd does not check the version of what it has not saved itself
        self.version = content._version if isinstance(content, Tensor) else 0


class Recompute(TorchFunctionMode):
    """While entered, operations save how to recompute tensors, not tensors.

    Gradients are those of the plain network to the bit: every tensor that the
    backward pass needs is computed once more, by the same operation from the
    same numbers, and is freed after its last use. The level is

    * ``'codes'``: quantized tensors, normalisations, activations and sums are
      recomputed; results of products are kept. Nothing is done twice that
      costs more than reading memory.
    * ``'recompute'``: results of products are recomputed as well, from inputs
      that are kept as 4- or 8-bit codes. Every second sum in a chain of
      residual blocks is kept.

    Tensors of unknown operations are saved as autograd would save them. Eager
    and recorded steps only; for compiled ones there is :func:`compiling_for`.

    Raises:
        UsageError: If the level is another, and in the backward pass if a
            tensor was overwritten in place that is needed to recompute one.
    """

    def __init__(self, level: str) -> None:
        super().__init__()
        if level not in LEVELS:
            raise UsageError(
                f'memory: expected one of {list(LEVELS)}, got {level!r}'
            )
        self.level = level
        self._known: dict[int, tuple[StorageWeakRef, int, _Recomputed]] = {}
        self._fresh: list[_Placeholder] = []
        self._hooks = ExitStack()

    def __enter__(self) -> 'Recompute':
        super().__enter__()
        self._hooks.enter_context(
            torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        )
        return self

    def __exit__(self, *exc: Any) -> None:
        self._hooks.close()
        self._known, self._fresh = {}, []
        super().__exit__(*exc)

    def _pack(self, tensor: Tensor) -> _Placeholder:
        slot = _Placeholder(tensor)
        self._replace(slot)
        if slot.content is tensor:
            # it may be the result of the operation that runs just now
            self._fresh.append(slot)
        return slot

    def _replace(self, slot: _Placeholder) -> None:
        handle = self._find(slot.content)
        if handle is not None:
            slot.content = handle
            recipe = handle.recipe if isinstance(handle, _View) else handle
            recipe.uses += 1

    def _find(self, tensor: Any) -> _Recomputed | _View | None:
        """How to recompute the tensor, if it is known."""
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
            form = same_call(func)
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

    def _norm_add_relu_quantize(
        self, z: Tensor, norm: BatchNorm, identity: Tensor,
        bound: float | None, step: Tensor, *how: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Like the two operations that it fuses."""
        again = self._recipe(normalise, (z, norm, identity, bound), {})
        x, spare, codes = norm_add_relu_quantize(
            z, norm, identity, bound, step, *how
        )
        self._remember(normalise, again, x)
        qmin, qmax, grad_scale = how
        args = (x, step, qmin, qmax, None, grad_scale)
        again = self._recipe(learned_step_quantize, args, {})
        self._remember(learned_step_quantize, again, codes, args)
        return x, spare, codes

    def _max_pool(
        self, x: Tensor, kernel_size: Any, return_indices: bool, **how: Any
    ) -> Tensor:
        """Keep no indices, which take four times the memory of the maxima;
        ``return_indices=True`` calls a different function of torch."""
        again = self._recipe(max_indices, (x, kernel_size), how)
        values, places = F.max_pool2d(
            x, kernel_size, **how, return_indices=True
        )
        self._remember(max_indices, again, places)
        return values

    def _recipe(
        self, func: Callable, args: Sequence[Any], kwargs: dict
    ) -> _Recomputed:
        def handle(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return self._find(value) or _Saved(value)

        return _Recomputed(
            func,
            [*map(handle, args)],
            {name: handle(value) for name, value in kwargs.items()},
        )

    def _remember(
        self, func: Callable, recipe: _Recomputed, output: Tensor,
        args: Sequence[Any] = (), kwargs: dict | None = None,
    ) -> None:  # fmt: skip
        """Note how to recompute the ``output`` of ``func``."""
        how = args[CODES[func] :][:3] if func in CODES else None
        if how and recipe.products and has_codes(output, *how[1:]):
            # the chain ends here: the next product begins with codes
            offset = (kwargs or {}).get('offset')
            codes = PackedTensor(output, *how, offset)
            recipe = _Recomputed(codes.value, [], {})
        recipe.products += func in PRODUCTS
        recipe.describe(output)
        saved = [h for h in recipe.handles if isinstance(h, _Saved)]
        place, storage = output.data_ptr(), output.untyped_storage()
        if (
            # overwritten just now, or passed through
            any(h.is_stale() or h.tensor.data_ptr() == place for h in saved)
            # it would take two tensors to make one
            or (func in SUMS and len(saved) == len(recipe.handles))
            or recipe.products > MOST_PRODUCTS
            or not is_dense(output)
            or output.nbytes != storage.nbytes()
        ):
            return
        self._known[storage.data_ptr()] = (
            StorageWeakRef(storage), output._version, recipe,
        )  # fmt: skip


def _unpack(slot: _Placeholder) -> Tensor:
    content = slot.content
    if not isinstance(content, Tensor):
        return content.value(consume=True)
    if content._version != slot.version:
        raise RuntimeError(
            'one of the variables needed for gradient computation has been '
            f'modified by an inplace operation: a tensor of shape '
            f'{tuple(content.shape)} is at version {content._version}; '
            f'expected version {slot.version} instead'
        )
    return content
