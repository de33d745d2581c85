"""Triton kernels of :mod:`.product_norm`, whose symbols they use: x is (M, K),
the weights (N, K), all of them rows after rows."""

import triton
import triton.language as tl

from .lsq_triton import quantized
from .norm_triton import activation, update_running


@triton.jit
def load_tile(ptr, i, j, ROWS, COLUMNS: tl.constexpr):
    """Elements (i, j) of a matrix, zeros outside of it."""
    inside = (i < ROWS)[:, None] & (j < COLUMNS)[None, :]
    places = i[:, None] * COLUMNS + j[None, :]
    return tl.load(ptr + places, mask=inside, other=0.0)


@triton.jit
def load_matrix(ptr, i, j, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Those, in float32."""
    return load_tile(ptr, i, j, ROWS, COLUMNS).to(tl.float32)


@triton.jit
def transposed_product_kernel(
    a_ptr,
    b_ptr,
    partial_ptr,
    rows,
    A: tl.constexpr,
    B: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    REPEATS: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Parts of :math:`a^T b` for a (M, A) and b (M, B): (splits, A, B); with
    SUM the sum of b is one row more."""
    TILES_A: tl.constexpr = (A + BLOCK_A - 1) // BLOCK_A
    TILES_B: tl.constexpr = (B + BLOCK_B - 1) // BLOCK_B
    tile = tl.program_id(0) % (TILES_A * TILES_B)
    split = tl.program_id(0) // (TILES_A * TILES_B)
    first = split * REPEATS * ROWS
    if WIDE:
        first = first.to(tl.int64)
    left = tile // TILES_B * BLOCK_A + tl.arange(0, BLOCK_A)
    right = tile % TILES_B * BLOCK_B + tl.arange(0, BLOCK_B)
    ones = tl.full([16, ROWS], 1.0, dtype=b_ptr.dtype.element_ty)
    product = tl.zeros([BLOCK_A, BLOCK_B], dtype=tl.float32)
    total = tl.zeros([16, BLOCK_B], dtype=tl.float32)
    for repeat in tl.range(0, REPEATS, num_stages=STAGES):
        m = first + repeat * ROWS + tl.arange(0, ROWS)
        a = load_tile(a_ptr, m, left, rows, A)
        b = load_tile(b_ptr, m, right, rows, B)
        product = tl.dot(tl.trans(a), b, product, input_precision='ieee')
        if SUM:
            # by units that are idle
            total = tl.dot(ones, b, total, input_precision='ieee')
    out = partial_ptr + split * (A + SUM) * B
    tl.store(
        out + left[:, None] * B + right[None, :],
        product,
        mask=(left < A)[:, None] & (right < B)[None, :],
    )
    if SUM:
        if tile // TILES_B == 0:
            sums = tl.sum(total, 0) / 16
            tl.store(out + A * B + right, sums, mask=right < B)


@triton.jit
def statistics_kernel(
    gram_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    rows,
    eps,
    momentum,
    N: tl.constexpr,
    K: tl.constexpr,
    RUNNING: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and 1 / standard deviation of z, (N,), for :math:`x^T x` with the
    sum of x below it, (K + 1, K)."""
    n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = n < N
    part = 1.0 / rows
    mean = tl.zeros([CHANNELS], dtype=tl.float32)
    var = tl.zeros([CHANNELS], dtype=tl.float32)
    for j in range(0, K, BLOCK):
        right = j + tl.arange(0, BLOCK)
        total = tl.load(gram_ptr + K * K + right, mask=right < K, other=0.0)
        w = load_matrix(w_ptr, n, right, N, K)
        mean += tl.sum(w * (total * part)[None, :], 1)
        product = tl.zeros([CHANNELS, BLOCK], dtype=tl.float32)
        for i in range(0, K, BLOCK):
            left = i + tl.arange(0, BLOCK)
            other = tl.load(gram_ptr + K * K + left, mask=left < K, other=0.0)
            cov = load_matrix(gram_ptr, left, right, K, K) * part
            cov -= (other * part)[:, None] * (total * part)[None, :]
            product = tl.dot(
                load_matrix(w_ptr, n, left, N, K), cov, product,
                input_precision='tf32x3',
            )  # fmt: skip
        var += tl.sum(product * w, 1)
    var = tl.maximum(var, 0.0)
    tl.store(mean_ptr + n, mean, mask=exists)
    tl.store(rstd_ptr + n, 1.0 / tl.sqrt(var + eps), mask=exists)
    if RUNNING:
        update_running(
            running_mean_ptr, running_var_ptr, n, exists, mean, var, rows,
            momentum,
        )  # fmt: skip


@triton.jit
def forward_kernel(
    x_ptr,
    w_ptr,
    identity_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    step_ptr,
    z_ptr,
    y_ptr,
    out_ptr,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    IDENTITY: tl.constexpr,
    BOUND: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BOTH: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Multiply, normalise, add, rectify, quantize: one tile for each program.
    ``out`` is the last of these; with BOTH, ``y`` is what is quantized, and
    with KEEP, ``z`` is the product."""
    TILES: tl.constexpr = (N + BLOCK - 1) // BLOCK
    block = tl.program_id(0) // TILES
    if WIDE:
        block = block.to(tl.int64)
    m = block * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    exists, inside = (m < rows)[:, None], (n < N)[None, :]
    z = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in tl.range(0, K, DEPTH, num_stages=STAGES):
        d = first + tl.arange(0, DEPTH)
        a = load_tile(x_ptr, m, d, rows, K)
        b = load_tile(w_ptr, n, d, N, K)
        z = tl.dot(a, tl.trans(b), z, input_precision='ieee')
    TYPE: tl.constexpr = out_ptr.dtype.element_ty
    places, mask = m[:, None] * N + n[None, :], exists & inside
    if KEEP:
        tl.store(z_ptr + places, z.to(TYPE), mask=mask)
    z = z.to(TYPE).to(tl.float32)
    identity = z
    if IDENTITY:
        identity = tl.load(identity_ptr + places, mask=mask, other=0.0)
        identity = identity.to(tl.float32)
    mean = tl.load(mean_ptr + n, mask=n < N, other=0.0)[None, :]
    factor = tl.load(rstd_ptr + n, mask=n < N, other=0.0)
    factor *= tl.load(weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    y = activation(
        z,
        identity,
        mean,
        factor[None, :],
        bias[None, :],
        IDENTITY,
        BOUND,
        TYPE,
    )
    if BOTH:
        tl.store(y_ptr + places, y.to(TYPE), mask=mask)
    if QUANTIZE:
        step = tl.load(step_ptr).to(tl.float32)
        inverse = tl.div_rn(1.0, step)
        y = quantized(y, step, inverse, 0.0, QMIN, QMAX, False)
    tl.store(out_ptr + places, y.to(TYPE), mask=mask)


@triton.jit
def weight_gradient_kernel(
    p_ptr,
    gram_ptr,
    w_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_bias_ptr,
    grad_weight_ptr,
    grad_w_ptr,
    ahead_ptr,
    slope_ptr,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of gamma, (N,), and of w, (N, K); and what the gradient of x
    needs: a w, (N, K), and c and c mu - b, (2, N)."""
    n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = n < N
    mean = tl.load(mean_ptr + n, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + n, mask=exists, other=0.0)
    factor = tl.load(weight_ptr + n, mask=exists, other=0.0).to(tl.float32)
    factor *= rstd
    grad_bias = tl.load(grad_bias_ptr + n, mask=exists, other=0.0)
    with_w = tl.zeros([CHANNELS], dtype=tl.float32)
    for j in range(0, K, BLOCK):
        right = j + tl.arange(0, BLOCK)
        p = load_matrix(p_ptr, n, right, N, K)
        with_w += tl.sum(p * load_matrix(w_ptr, n, right, N, K), 1)
    grad_weight = rstd * (with_w - mean * grad_bias)
    slope = factor * rstd * grad_weight / rows
    shift = factor * grad_bias / rows
    tl.store(grad_weight_ptr + n, grad_weight, mask=exists)
    tl.store(slope_ptr + n, slope, mask=exists)
    tl.store(slope_ptr + N + n, slope * mean - shift, mask=exists)
    for j in range(0, K, BLOCK):
        right = j + tl.arange(0, BLOCK)
        total = tl.load(gram_ptr + K * K + right, mask=right < K, other=0.0)
        product = tl.zeros([CHANNELS, BLOCK], dtype=tl.float32)
        for i in range(0, K, BLOCK):
            left = i + tl.arange(0, BLOCK)
            product = tl.dot(
                load_matrix(w_ptr, n, left, N, K),
                load_matrix(gram_ptr, left, right, K, K), product,
                input_precision='tf32x3',
            )  # fmt: skip
        w = load_matrix(w_ptr, n, right, N, K)
        grad_w = factor[:, None] * load_matrix(p_ptr, n, right, N, K)
        grad_w -= slope[:, None] * (product - mean[:, None] * total[None, :])
        grad_w -= shift[:, None] * total[None, :]
        places = n[:, None] * K + right[None, :]
        inside = exists[:, None] & (right < K)[None, :]
        TYPE: tl.constexpr = grad_w_ptr.dtype.element_ty
        tl.store(grad_w_ptr + places, grad_w.to(TYPE), mask=inside)
        ahead = (factor[:, None] * w).to(ahead_ptr.dtype.element_ty)
        tl.store(ahead_ptr + places, ahead, mask=inside)


@triton.jit
def across_kernel(
    w_ptr,
    slope_ptr,
    across_ptr,
    constant_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """:math:`-w^T c w`, (K, K), and :math:`(c \\mu - b)^T w`, (K,)."""
    TILES: tl.constexpr = (K + BLOCK - 1) // BLOCK
    left = tl.program_id(0) // TILES * BLOCK + tl.arange(0, BLOCK)
    right = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    across = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    constant = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, N, CHANNELS):
        n = first + tl.arange(0, CHANNELS)
        slope = tl.load(slope_ptr + n, mask=n < N, other=0.0)
        offset = tl.load(slope_ptr + N + n, mask=n < N, other=0.0)
        a = load_matrix(w_ptr, n, left, N, K) * slope[:, None]
        b = load_matrix(w_ptr, n, right, N, K)
        across = tl.dot(tl.trans(a), b, across, input_precision='tf32x3')
        constant += tl.sum(b * offset[:, None], 0)
    inside = (left < K)[:, None] & (right < K)[None, :]
    places = left[:, None] * K + right[None, :]
    TYPE: tl.constexpr = across_ptr.dtype.element_ty
    tl.store(across_ptr + places, (-across).to(TYPE), mask=inside)
    if tl.program_id(0) // TILES == 0:
        tl.store(constant_ptr + right, constant, mask=right < K)


@triton.jit
def input_gradient_kernel(
    g_ptr,
    ahead_ptr,
    x_ptr,
    across_ptr,
    constant_ptr,
    grad_x_ptr,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``g ahead + x across + constant``, (M, K), of g (M, N), ahead (N, K), x
    (M, K), across (K, K) and constant (K,)."""
    TILES: tl.constexpr = (K + BLOCK - 1) // BLOCK
    block = tl.program_id(0) // TILES
    if WIDE:
        block = block.to(tl.int64)
    m = block * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) % TILES * BLOCK + tl.arange(0, BLOCK)
    exists, inside = (m < rows)[:, None], (k < K)[None, :]
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for first in tl.range(0, N, DEPTH, num_stages=STAGES):
        d = first + tl.arange(0, DEPTH)
        a = load_tile(g_ptr, m, d, rows, N)
        b = load_tile(ahead_ptr, d, k, N, K)
        total = tl.dot(a, b, total, input_precision='ieee')
    for first in tl.range(0, K, DEPTH, num_stages=STAGES):
        d = first + tl.arange(0, DEPTH)
        a = load_tile(x_ptr, m, d, rows, K)
        b = load_tile(across_ptr, d, k, K, K)
        total = tl.dot(a, b, total, input_precision='ieee')
    total += tl.load(constant_ptr + k, mask=k < K, other=0.0)[None, :]
    tl.store(
        grad_x_ptr + m[:, None] * K + k[None, :],
        total.to(grad_x_ptr.dtype.element_ty),
        mask=exists & inside,
    )
