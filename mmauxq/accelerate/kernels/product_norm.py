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

MOST_INPUTS = 256
"""Columns of x for which this pays."""
LIBRARY = 128
"""Columns from which on cuBLAS multiplies what is long and narrow faster."""
# the best of the measured tiles on an H200, or nearly so and fast to compile
WIDTH, DEPTH = 128, 64
FORWARD = dict(ROWS=64, STAGES=2, num_warps=8)
INPUT_GRADIENT = dict(ROWS=128, STAGES=3)
SMALL = dict(CHANNELS=16, BLOCK=64)


@dataclass
class ProductNorm:
    """Statistics of z, (N,), float32; what they are made of, of the rows of
    x, (M, K): :math:`x^T x` with the sum of x below it, (K + 1, K)."""

    mean: Tensor
    rstd: Tensor
    gram: Tensor


def takes(rows: int, inputs: int) -> bool:
    """Whether this pays for ``x`` (rows, inputs)."""
    return rows > 1 and inputs <= MOST_INPUTS


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

    gram = _transposed_product(x, x, with_sum=True)
    n, k = w.shape
    mean, rstd = torch.empty(2, n, dtype=torch.float32, device=x.device)
    launch(
        statistics_kernel, x, _blocks(n, SMALL['CHANNELS']),
        gram, w, mean, rstd, mean if running_mean is None else running_mean,
        rstd if running_var is None else running_var, float(len(x)), eps,
        momentum,
        N=n, K=k, RUNNING=running_mean is not None, **SMALL, num_warps=4,
    )  # fmt: skip
    return ProductNorm(mean, rstd, gram)


def product_forward(
    x: Tensor,
    w: Tensor,
    norm: ProductNorm,
    weight: Tensor,
    bias: Tensor,
    identity: Tensor | None,
    bound: float | None,
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
    width = min(WIDTH, _dot_size(n))
    blocks = _blocks(len(x), FORWARD['ROWS']) * _blocks(n, width)
    launch(
        forward_kernel, x, blocks, x, w,
        out if identity is None else identity, norm.mean, norm.rstd, weight,
        bias, norm.mean if step is None else step, out if z is None else z,
        out if y is None else y, out, len(x),
        N=n, K=k, QMIN=codes[0], QMAX=codes[1], IDENTITY=identity is not None,
        BOUND=bound or 0.0, QUANTIZE=step is not None, BOTH=y is not None,
        KEEP=z is not None, BLOCK=width, DEPTH=min(DEPTH, _dot_size(k)),
        WIDE=is_wide(out), **FORWARD,
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
    width = min(WIDTH, _dot_size(k))
    blocks = _blocks(rows, INPUT_GRADIENT['ROWS']) * _blocks(k, width)
    launch(
        input_gradient_kernel, x, blocks, g, ahead, x, across, constant,
        grad_x, rows, N=n, K=k, BLOCK=width, DEPTH=DEPTH, WIDE=is_wide(g),
        num_warps=4 if width <= 64 else 8, **INPUT_GRADIENT,
    )  # fmt: skip
    return grad_x, grad_w, grad_weight


def _transposed_product(
    a: Tensor, b: Tensor, with_sum: bool = False
) -> Tensor:
    """``a^T b``, (A, B), of (M, A) and (M, B), summed in float32; the sum of
    ``b`` below it on demand, (A + 1, B)."""
    from .product_norm_triton import transposed_product_kernel

    (m, n), k = a.shape, b.shape[1]
    if a.is_cuda and not with_sum and min(n, k) >= LIBRARY:
        # split along M to fill the GPU
        size = 1
        while m % (2 * size) == 0 and size * n * k < 2**20 and size < 64:
            size *= 2
        parts = a.view(size, -1, n).transpose(1, 2), b.view(size, -1, k)
        return torch.bmm(*parts, out_dtype=torch.float32).sum(0)
    left, right = (min(WIDTH, _dot_size(v)) for v in (n, k))
    rows = max(64, 8192 // max(left, right))
    tiles, steps = _blocks(n, left) * _blocks(k, right), _blocks(m, rows)
    splits = max(1, min(steps, 2 * multiprocessors(a.device) // tiles))
    repeats = _blocks(steps, splits)
    splits = _blocks(steps, repeats)
    partial = a.new_empty((splits, n + with_sum, k), dtype=torch.float32)
    launch(
        transposed_product_kernel, a, tiles * splits, a, b, partial, m,
        A=n, B=k, BLOCK_A=left, BLOCK_B=right, SUM=with_sum, ROWS=rows,
        REPEATS=repeats, STAGES=4 if left < WIDTH else 3,
        WIDE=is_wide(a) or is_wide(b),
        num_warps=4 if left * right <= 64 * 64 else 8,
    )  # fmt: skip
    return partial.sum(0)


def _dot_size(n: int) -> int:
    """The size of a tile of products for ``n``, 16 at least."""
    return max(16, power_of_two(n))


def _blocks(total: int, each: int) -> int:
    return -(-total // each)
