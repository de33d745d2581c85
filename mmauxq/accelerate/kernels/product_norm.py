r"""Batch norm behind a 1x1 convolution, without a pass over its output.

The output is a matrix product, ``z = x w^T``, of x (M, K) with the weights w
(N, K), M = N H W rows. What batch norm needs of z is in products of x:

.. math::
    s = \sum_m x_m \qquad G = x^T x \qquad C = G / M - s s^T / M^2

    \mu_n = w_n^T s / M \qquad \sigma_n^2 = w_n^T C w_n

and its backward pass, with g the gradient of its result, in those and one
product more, :math:`P = g^T x`:

.. math::
    S_n = \sum_m g_{mn} \qquad
    T_n = \rho_n (w_n^T P_n - \mu_n S_n) \qquad \rho_n = (\sigma_n^2 +
    \epsilon)^{-1/2}

    \partial z = a g - b - c (z - \mu) \qquad a = \gamma \rho \quad
    b = a S / M \quad c = a \rho T / M

    \partial w = a P - b s^T - c (w G - \mu s^T)

    \partial x = g\,(a w) - x\,(w^T c w) + (c \mu - b)^T w

where S and T are the gradients of the bias and of :math:`\gamma`. As the
statistics are known before the product is taken, it is normalised where it is
made. With N at least 2 K, as in the last convolution of a bottleneck block,
this reads and writes far less: neither z nor its gradient is ever in memory.
Sums are float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .tiles import is_wide, launch, multiprocessors, power_of_two

# rows, columns, depth, stages and warps of a tile of the gradient of x, by
# the columns there are; the best of the measured ones on an H200
INPUT_GRADIENT = {
    64: (128, 64, 64, 3, 4),
    128: (128, 128, 64, 3, 4),
    256: (128, 256, 64, 4, 8),
}
GRAM_ROWS, GRAM_STAGES = 64, 4
FORWARD_WIDTH = 128
FORWARD = dict(ROWS=64, DEPTH=64, STAGES=2, num_warps=8)
SMALL = dict(CHANNELS=16, BLOCK=64)


@dataclass
class ProductNorm:
    """Statistics of z, (N,), float32; what they are made of, of the rows of
    x, (M, K): :math:`x^T x` with the sum of x below it, (K + 1, K)."""

    mean: Tensor
    rstd: Tensor
    gram: Tensor


def takes(rows: int, inputs: int) -> bool:
    """Whether there is a tile for ``x`` (rows, inputs)."""
    return rows > 1 and inputs <= max(INPUT_GRADIENT)


def product_norm(
    x: Tensor,
    w: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> ProductNorm:
    """Statistics of ``z = x w^T`` for x (M, K) and w (N, K); updates the
    running ones, (N,), if there are any, in place."""
    from .product_norm_triton import statistics_kernel

    gram = _gram(x)
    n, k = w.shape
    mean, rstd = torch.empty(2, n, dtype=torch.float32, device=x.device)
    launch(
        statistics_kernel, x, _blocks(n, SMALL['CHANNELS']),
        gram, w, mean, rstd, running_mean if running_mean is not None else mean,
        running_var if running_var is not None else rstd,
        float(len(x)), eps, momentum,
        N=n, K=k, RUNNING=running_mean is not None, **SMALL, num_warps=4,
    )  # fmt: skip
    return ProductNorm(mean, rstd, gram)


def _gram(x: Tensor) -> Tensor:
    """:math:`x^T x` and the sum of x, (K + 1, K), float32."""
    from .product_norm_triton import gram_kernel

    rows, k = x.shape
    block = min(128, max(16, power_of_two(k)))
    tiles = _blocks(k, block) ** 2
    steps = _blocks(rows, GRAM_ROWS)
    splits = max(1, min(steps, 2 * multiprocessors(x.device) // tiles))
    repeats = _blocks(steps, splits)
    splits = _blocks(steps, repeats)
    partial = x.new_empty((splits, k + 1, k), dtype=torch.float32)
    launch(
        gram_kernel, x, tiles * splits, x, partial, rows, K=k, BLOCK=block,
        ROWS=GRAM_ROWS, REPEATS=repeats, STAGES=GRAM_STAGES, WIDE=is_wide(x),
        num_warps=4 if block <= 64 else 8,
    )  # fmt: skip
    return partial.sum(0)


def product_forward(
    x: Tensor,
    w: Tensor,
    norm: ProductNorm,
    weight: Tensor,
    bias: Tensor,
    identity: Tensor | None,
    relu: bool,
    step: Tensor | None,
    codes: tuple[int, int],
    out: Tensor,
    y: Tensor | None,
    z: Tensor | None,
) -> None:
    """Fill ``out`` (M, N) with the product, normalised, with ``identity``,
    ReLU and quantizer behind it as far as there are any; ``y`` with what is
    quantized, and ``z`` with the product, where they are given."""
    from .product_norm_triton import forward_kernel

    n, k = w.shape
    width = min(FORWARD_WIDTH, max(16, power_of_two(n)))
    blocks = _blocks(len(x), FORWARD['ROWS']) * _blocks(n, width)
    launch(
        forward_kernel, x, blocks, x, w,
        out if identity is None else identity, norm.mean, norm.rstd, weight,
        bias, norm.mean if step is None else step, out if z is None else z,
        out if y is None else y, out, len(x),
        N=n, K=k, QMIN=codes[0], QMAX=codes[1], IDENTITY=identity is not None,
        RELU=relu, QUANTIZE=step is not None, BOTH=y is not None,
        KEEP=z is not None, BLOCK=width, WIDE=is_wide(out), **FORWARD,
    )  # fmt: skip


def product_norm_backward(
    g: Tensor,
    grad_bias: Tensor,
    x: Tensor,
    w: Tensor,
    weight: Tensor,
    norm: ProductNorm,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (M, K), of w (N, K) and of the batch norm's ``weight``
    (N,), from that of its result, g (M, N), and that of its bias, the sum of
    g, (N,)."""
    from .product_norm_triton import (
        across_kernel,
        input_gradient_kernel,
        weight_gradient_kernel,
    )

    rows, (n, k) = len(x), w.shape
    grad_weight, slope = torch.empty_like(norm.mean), norm.mean.new_empty(2, n)
    grad_w, ahead = torch.empty_like(w), w.new_empty((n, k), dtype=g.dtype)
    launch(
        weight_gradient_kernel, x, _blocks(n, SMALL['CHANNELS']),
        _transposed_product(g, x), norm.gram, w, weight, norm.mean, norm.rstd,
        grad_bias, grad_weight, grad_w, ahead, slope, float(rows),
        N=n, K=k, **SMALL, num_warps=4,
    )  # fmt: skip
    across = x.new_empty(k, k)
    constant = norm.mean.new_empty(k)
    block = 32
    launch(
        across_kernel, x, _blocks(k, block) ** 2, w, slope, across, constant,
        N=n, K=k, CHANNELS=64, BLOCK=block, num_warps=4,
    )  # fmt: skip
    grad_x = torch.empty_like(x)
    width = next(v for v in INPUT_GRADIENT if v >= k)
    height, width, depth, stages, warps = INPUT_GRADIENT[width]
    launch(
        input_gradient_kernel, x, _blocks(rows, height) * _blocks(k, width),
        g, ahead, x, across, constant, grad_x, rows, N=n, K=k, ROWS=height,
        BLOCK=width, DEPTH=depth, STAGES=stages, WIDE=is_wide(g),
        num_warps=warps,
    )  # fmt: skip
    return grad_x, grad_w, grad_weight


def _transposed_product(g: Tensor, x: Tensor) -> Tensor:
    """``g^T x``, (N, K), of (M, N) and (M, K), summed in float32."""
    (m, n), k = g.shape, x.shape[1]
    if not g.is_cuda:
        return g.float().t() @ x.float()
    # a product of few rows and columns is split along M to fill the GPU
    size = 1
    while m % (2 * size) == 0 and size * n * k < 2**20 and size < 64:
        size *= 2
    parts = g.view(size, -1, n).transpose(1, 2), x.view(size, -1, k)
    return torch.bmm(*parts, out_dtype=torch.float32).sum(0)


def _blocks(total: int, each: int) -> int:
    return -(-total // each)
