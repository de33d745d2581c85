"""Which operations are recomputed in the backward pass, and how."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmauxq.quantizers.functional import learned_step_quantize

from .kernels.norm import (
    BatchNorm,
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


CHEAP: dict[Callable, Callable[..., Call]] = {
    F.batch_norm: _batch_norm,
    F.layer_norm: same_call(F.layer_norm),
    F.relu: _out_of_place(F.relu),
    F.relu6: _out_of_place(F.relu6),
    F.hardtanh: _out_of_place(F.hardtanh),
    F.silu: _out_of_place(F.silu),
    F.hardswish: _out_of_place(F.hardswish),
    F.gelu: same_call(F.gelu),
    torch.relu: same_call(torch.relu),
    torch.relu_: same_call(torch.relu),
    Tensor.relu: same_call(torch.relu),
    Tensor.relu_: same_call(torch.relu),
    Tensor.float: same_call(Tensor.float),
    learned_step_quantize: same_call(learned_step_quantize),
    normalise: same_call(normalise),
    normalise_quantize: same_call(normalise_quantize),
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
    """The packed result of ``learned_step_quantize``, given first."""
    with torch.no_grad():
        return PackedTensor(
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
) -> PackedTensor:
    """The packed result of ``normalise_quantize``, given first."""
    return _codes(output, z, step, qmin, qmax)


CODES: dict[Callable, Callable[..., PackedTensor]] = {
    learned_step_quantize: _codes,
    normalise_quantize: _normalised_codes,
}
"""Functions whose result is quantized -> how it is packed."""


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
