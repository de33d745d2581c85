"""A batch norm and what follows it, in one pass over memory each way.

::

    x = act(batch_norm(z) + identity)        normalise
    q = quantize(act(batch_norm(z)))         normalise_quantize
    x, x, quantize(x)                        norm_add_relu_quantize

with batch statistics. ``act`` is ReLU, ReLU6 or the identity; ``quantize`` is
:func:`~mmauxq.quantizers.functional.learned_step_quantize` with a single step.
Only ``z`` (and ``x``) are kept for the backward pass, which recomputes the
rest; behind a 1x1 convolution to many channels not even ``z``, see
:mod:`.product_norm`. Values are rounded where separate operations would round
them. Sums are taken in float32, always in the same order.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import wrap_torch_function

from .dispatch import KERNEL_DTYPES, runs_triton, wants_kernel
from .product_norm import (
    ProductNorm,
    product_forward,
    product_norm,
    product_norm_backward,
)
from .tiles import laid_out_like, launch, power_of_two, split_tiles, tiles

# (elements of a tile, channels in it at the most) and warps, the best of a
# sweep over the shapes of ResNet-50 on one NVIDIA H200; where programs sum
# over tiles, also how many of them a multiprocessor has. SUM_TILE is of
# partial sums, and the best for ResNet-20, too
FORWARD_TILE = BACKWARD_TILE = (4096, 128)
WARPS = 4
STATISTICS_TILE, STATISTICS_WARPS, STATISTICS_PROGRAMS = (4096, 64), 8, 4
REDUCE_TILE, REDUCE_WARPS, REDUCE_PROGRAMS = (1024, 64), 4, 16
SUM_TILE, SUM_WARPS = (4096, 4), 8


@dataclass
class BatchNorm:
    """Affine parameters of a batch norm, (C,), and its batch statistics: mean
    and ``rstd = 1 / sqrt(variance + eps)``, (C,), float32."""

    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    product: 'Product | None' = None


@dataclass
class Product:
    """Where z comes from: a 1x1 convolution of ``x``, (N, K, H, W), channels
    last, with the weights ``w``, (C, K, 1, 1). It was not computed:
    ``memory`` is for what is made of it."""

    x: Tensor
    w: Tensor
    memory: Tensor
    norm: ProductNorm
    is_free: bool = True

    def space(self) -> Tensor:
        """Memory in the shape of z: at first what was set apart."""
        is_free, self.is_free = self.is_free, False
        return (
            self.memory.detach() if is_free else torch.empty_like(self.memory)
        )


def has_kernels(x: Tensor) -> bool:
    """Whether these ops run where ``x`` is."""
    return wants_kernel(x) and runs_triton(x)


def can_normalise(
    z: Tensor, weight: Tensor | None, bias: Tensor | None
) -> bool:
    """Whether these ops take a feature map: (N, C, H, W), channels last."""
    return (
        has_kernels(z)
        and z.dim() == 4
        and z.dtype in KERNEL_DTYPES
        and z.numel() > z.shape[1] > 0
        and z.is_contiguous(memory_format=torch.channels_last)
        and weight is not None
        and bias is not None
        and weight.device == bias.device == z.device
    )


@torch.no_grad()
def batch_statistics(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> BatchNorm:
    """Statistics of a batch (N, C, H, W), see :func:`can_normalise`; updates
    the running ones, (C,), if there are any, in place, with the weight
    ``momentum`` for this batch."""
    from .norm_triton import finish_kernel, statistics_kernel

    programs, how = split_tiles(z, 1, STATISTICS_TILE, STATISTICS_PROGRAMS)
    channels, splits = z.shape[1], how['splits']
    partial = torch.empty(
        2, splits, channels, dtype=torch.float32, device=z.device
    )
    mean, rstd = torch.empty_like(partial[:, 0])
    launch(
        statistics_kernel, z, programs, z, partial, **how,
        num_warps=STATISTICS_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    columns, tile = _columns(channels, splits)
    launch(
        finish_kernel, z, columns, z, partial, mean, rstd,
        mean if running_mean is None else running_mean,
        rstd if running_var is None else running_var,
        how['rows'], channels, splits, eps, momentum,
        RUNNING=running_mean is not None, **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return BatchNorm(mean, rstd, weight, bias)


def _columns(channels: int, splits: int) -> tuple[int, dict[str, int]]:
    """How programs divide partial sums, (splits, channels): number of columns
    of channels, and what a kernel is told of them."""
    elements, width = SUM_TILE
    width = min(power_of_two(channels), width)
    rows = min(power_of_two(splits), elements // width)
    return -(-channels // width), dict(
        ROWS=rows, CHANNELS=width, num_warps=SUM_WARPS
    )


@torch.no_grad()
def product_statistics(
    x: Tensor,
    w: Tensor,
    memory: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> BatchNorm:
    """:func:`batch_statistics` of the 1x1 convolution z of x with w, which
    need not be there: see :class:`Product`. Differs from it by the rounding
    of z."""
    norm = product_norm(
        _rows(x), w.flatten(1), running_mean, running_var, momentum, eps
    )
    product = Product(x, w, memory, norm)
    return BatchNorm(norm.mean, norm.rstd, weight, bias, product)


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W), channels last, as (N H W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


_overridable = wrap_torch_function(lambda z, *_, **__: (z,))
"""Modes and subclasses of tensors see the whole operation."""


@_overridable
def normalise(
    z: Tensor, norm: BatchNorm, identity: Tensor | None, bound: float | None
) -> Tensor:
    """``act(batch_norm(z) + identity)``.

    Args:
        z: (N, C, H, W), channels last.
        norm: Of :func:`batch_statistics` for ``z``; gradients reach ``z``
            through the statistics too.
        identity: In the shape, dtype and layout of ``z``, or ``None``.
        bound: Where ``act`` is a ReLU, the most that it lets through: ``inf``,
            or 6 in ReLU6.
    """
    return _apply(z, norm, identity, None, bound, None)


@_overridable
def normalise_quantize(
    z: Tensor,
    norm: BatchNorm,
    bound: float | None,
    step: Tensor,
    qmin: int,
    qmax: int,
    grad_scale: float,
) -> Tensor:
    """``learned_step_quantize(act(batch_norm(z)), step, ...)``, with a single
    step; the other arguments are those of :func:`normalise`."""
    codes = qmin, qmax, grad_scale
    return _apply(z, norm, None, step, bound, codes)


@_overridable
def norm_add_relu_quantize(
    z: Tensor,
    norm: BatchNorm,
    identity: Tensor,
    bound: float | None,
    step: Tensor,
    qmin: int,
    qmax: int,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x = normalise(...)``, an alias of it, and the quantized ``x``.

    For a residual sum, which the next block, its quantizer and perhaps a tap
    read. The two ``x`` share their memory; with one for each reader, their
    gradients are added in the same pass.
    """
    codes = qmin, qmax, grad_scale
    return _apply(z, norm, identity, step, bound, codes)


def _apply(
    z: Tensor,
    norm: BatchNorm,
    identity: Tensor | None,
    step: Tensor | None,
    bound: float | None,
    codes: tuple[int, int, float] | None,
) -> Any:
    of: tuple = (z, None, None)
    if norm.product is not None:
        of = (None, norm.product.x, norm.product.w)
    return _Normalise.apply(
        *of, norm.weight, norm.bias, identity, step, norm, bound, codes
    )


class _Normalise(torch.autograd.Function):
    """Returns ``x`` without a step, the quantized ``x`` with one, and with a
    step and an identity ``x``, its alias, and the quantized ``x``."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor | None,
        inputs: Tensor | None,
        w: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        identity: Tensor | None,
        step: Tensor | None,
        norm: BatchNorm,
        bound: float | None,
        codes: tuple[int, int, float] | None,
    ) -> Tensor | tuple[Tensor, ...]:
        from .norm_triton import forward_kernel

        ctx.set_materialize_grads(False)
        both = identity is not None and codes is not None
        product, (qmin, qmax, _) = norm.product, codes or (0, 1, 1.0)
        if product is None:
            assert z is not None
            out = torch.empty_like(z)
        else:
            out = product.space()
        x = torch.empty_like(out) if both else out
        if product is not None:
            if codes is not None and not both:
                z = torch.empty_like(out)  # for the quantizer's gradient
            product_forward(
                _rows(product.x), product.w.flatten(1), product.norm, weight,
                bias, identity, bound, step, (qmin, qmax), out,
                x if both else None, z,
            )  # fmt: skip
        else:
            assert z is not None
            blocks, columns, how = tiles(z, 1, FORWARD_TILE)
            launch(
                forward_kernel, z, blocks * columns,
                z, z if identity is None else identity, norm.mean, norm.rstd,
                weight, bias, norm.mean if step is None else step, x, out,
                QMIN=qmin, QMAX=qmax, IDENTITY=identity is not None,
                BOUND=bound or 0.0, QUANTIZE=codes is not None, BOTH=both,
                **how, num_warps=WARPS,
            )  # fmt: skip
        # the mask of a ReLU is read off its result, unless that is quantized
        read = x if both or (bound and codes is None) else None
        ctx.norm = None if product is None else product.norm
        ctx.save_for_backward(
            z, read, norm.mean, norm.rstd, weight, bias, step, inputs, w
        )
        ctx.has_identity = identity is not None
        ctx.bound, ctx.codes = bound, codes
        return (x, x.detach(), out) if both else out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from .norm_triton import backward_kernel, reduce_kernel, sum_kernel

        z, x, mean, rstd, weight, bias, step, inputs, w = ctx.saved_tensors
        given_grads = [grad for grad in grads if grad is not None]
        if not given_grads:
            return (None,) * 10
        like = z if z is not None else x
        if like is None:
            like = given_grads[0].contiguous(memory_format=torch.channels_last)
        grad = torch.zeros_like(like) if grads[-1] is None else grads[-1]
        grad, *others = (
            laid_out_like(g, like, like.dtype)
            for g in (grad, *grads[-2::-1])
            if g is not None
        )
        qmin, qmax, grad_scale = ctx.codes or (0, 1, 1.0)
        given = (
            grad, *[*others, like, like][:2], like, like if x is None else x,
            mean, rstd, weight, bias, mean if step is None else step,
        )  # fmt: skip
        flags = dict(
            QMIN=qmin, QMAX=qmax, BOUND=ctx.bound or 0.0,
            QUANTIZE=step is not None, OTHERS=len(others), READ=x is not None,
        )  # fmt: skip
        programs, how = split_tiles(like, 1, REDUCE_TILE, REDUCE_PROGRAMS)
        splits, channels = how['splits'], like.shape[1]
        sums = torch.empty(
            2, channels, dtype=torch.float32, device=like.device
        )
        partial = sums.new_empty(2, splits, channels)
        step_partial = partial if step is None else sums.new_empty(programs)
        # the gradient of the batch norm's result: what came in, if there is
        # nothing behind it
        received = grad
        if (ctx.has_identity or ctx.norm is not None) and (
            ctx.bound or others or step is not None
        ):
            received = torch.empty_like(like)
        launch(
            reduce_kernel, like, programs, *given, partial, step_partial,
            received, IDENTITY=received is not grad, HAS_Z=z is not None,
            **flags, **how, num_warps=REDUCE_WARPS,
        )  # fmt: skip
        grad_step = None if step is None else torch.empty_like(step)
        columns, tile = _columns(channels, splits)
        launch(
            sum_kernel, like, 2 * columns + (step is not None), partial,
            step_partial, sums, sums if grad_step is None else grad_step,
            grad_scale, channels, splits, programs, columns, **tile,
            enable_fp_fusion=True,
        )  # fmt: skip
        grad_z = grad_x = grad_w = None
        grad_bias, grad_weight = sums[0], sums[1]
        if ctx.norm is not None:
            flat, grad_w, grad_weight = product_norm_backward(
                _rows(received), grad_bias, _rows(inputs), w.flatten(1),
                weight, ctx.norm,
            )  # fmt: skip
            n, _, height, width = inputs.shape
            grad_x = flat.view(n, height, width, -1).permute(0, 3, 1, 2)
            grad_w = grad_w.view_as(w)
        else:
            if received is not grad:
                # it is the sum of all incoming gradients: one read instead of
                # up to four
                given = (received, *given[1:])
                flags.update(BOUND=0.0, QUANTIZE=False, OTHERS=0, READ=False)
            grad_z = torch.empty_like(z)
            blocks, columns, how = tiles(z, 1, BACKWARD_TILE)
            launch(
                backward_kernel, z, blocks * columns, *given, sums, grad_z,
                **flags, **how, num_warps=WARPS,
            )  # fmt: skip
        return (
            grad_z, grad_x, grad_w, grad_weight.to(weight.dtype),
            grad_bias.to(bias.dtype),
            received if ctx.has_identity else None, grad_step, None, None,
            None,
        )  # fmt: skip
