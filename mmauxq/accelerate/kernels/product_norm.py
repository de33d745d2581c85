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

where S and T are the gradients of the bias and of :math:`\gamma`. With N at
least 2 K, as in the last convolution of a bottleneck block, this reads and
writes far less: z is read neither for its statistics nor in the backward pass,
and its gradient is never written. Sums are float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Products:
    """Of the rows of x, (M, K): their sum (K,), :math:`x^T x` (K, K), and
    how many there are."""

    total: Tensor
    gram: Tensor
    rows: int


@dataclass
class ProductNorm:
    """Statistics of z, (N,), float32, and what they were made of."""

    mean: Tensor
    var: Tensor
    rstd: Tensor
    products: Products


def products_of(x: Tensor) -> Products:
    """For x (M, K)."""
    return Products(_sum(x), transposed_product(x, x), len(x))


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b``, (A, B), of (M, A) and (M, B), summed in float32."""
    if not a.is_cuda:
        wide = torch.promote_types(a.dtype, torch.float32)
        return a.to(wide).t() @ b.to(wide)
    # a product of few rows and columns is split along M to fill the GPU
    size, (m, n), k = 1, a.shape, b.shape[1]
    while m % (2 * size) == 0 and size * n * k < 2**20 and size < 64:
        size *= 2
    parts = a.view(size, -1, n).transpose(1, 2), b.view(size, -1, k)
    return torch.bmm(*parts, out_dtype=torch.float32).sum(0)


def product_norm(products: Products, w: Tensor, eps: float) -> ProductNorm:
    """Statistics of ``z = x w^T``; ``w`` is (N, K)."""
    w = w.to(products.gram.dtype)
    total, gram, rows = products.total, products.gram, products.rows
    cov = gram / rows - torch.outer(total, total) / rows**2
    mean = w @ total / rows
    var = ((w @ cov) * w).sum(1).clamp_min(0)
    return ProductNorm(mean, var, (var + eps).rsqrt(), products)


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
    total, gram, rows = (
        norm.products.total, norm.products.gram, norm.products.rows,
    )  # fmt: skip
    wide = w.to(gram.dtype)
    factor = weight.to(gram.dtype) * norm.rstd
    p = transposed_product(g, x)
    grad_weight = norm.rstd * ((p * wide).sum(1) - norm.mean * grad_bias)
    slope = factor * norm.rstd * grad_weight / rows
    shift = factor * grad_bias / rows
    centred = wide @ gram - torch.outer(norm.mean, total)
    grad_w = factor[:, None] * p - slope[:, None] * centred
    grad_w -= torch.outer(shift, total)
    ahead = (factor[:, None] * wide).to(g.dtype)
    across = -(wide.t() * slope) @ wide
    constant = (slope * norm.mean - shift) @ wide
    grad_x = torch.addmm(constant.to(x.dtype), x, across.to(x.dtype))
    grad_x.addmm_(g, ahead)
    return grad_x, grad_w.to(w.dtype), grad_weight


def _sum(x: Tensor) -> Tensor:
    return x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
