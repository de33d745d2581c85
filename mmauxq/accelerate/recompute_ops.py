"""Which operations are recomputed in the backward pass, and how."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmauxq.quantizers.functional import learned_step_quantize

from .kernels.norm import (
    norm_add_relu_quantize,
    normalise,
    normalise_quantize,
)
from .kernels.packed import PackedTensor

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


def _codes(
    output: Tensor,
    x: Tensor,
    step: Tensor,
    qmin: int,
    qmax: int,
    offset: Tensor | None = None,
    grad_scale: float = 1.0,
) -> PackedTensor:
    return PackedTensor(output, step, qmin, qmax, offset)


CODES: dict[Callable, Callable[..., PackedTensor]] = {
    learned_step_quantize: _codes,
    normalise_quantize: lambda output, z, norm, relu, *how: _codes(
        output, z, *how[:3]
    ),
}
"""Functions whose result is quantized -> how to pack it, given the result and
the arguments of the function."""


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
