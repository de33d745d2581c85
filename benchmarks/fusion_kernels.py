"""1x1 convolutions fused with what stands around them, to be measured.

Not a part of the package: :mod:`.fusions` measures what these kernels would
bring, and nothing else uses them. A convolution is a matrix product of
(rows, channels): N H W rows for a channels-last feature map.

    forward       z = q w^T with q read as codes, and the statistics of z
    input_grad    batch norm's backward in front of the product with w; behind
                  it what :mod:`mmauxq.accelerate.kernels.norm` does in its
                  first pass: mask, sum of gradients, sums of each channel
    weight_grad   the same in front of the product with codes

Values are rounded where today's kernels round them, sums are taken in float32
in an order that never changes, without atomics. Offsets have 32 bits.
"""

import triton
import triton.language as tl

from mmauxq.accelerate.kernels.lsq_triton import (
    ROUND,
    clip,
    div_rn_clipped,
    load_per_channel,
    lsq_grad,
    place,
    tile,
)
from mmauxq.accelerate.kernels.norm_triton import activation
from mmauxq.accelerate.kernels.packed_triton import pack_kernel  # noqa: F401

PLAIN, NORM, NORM_MASK = (tl.constexpr(i) for i in range(3))
"""In front of a product: nothing; batch norm's backward; mask and this."""
NOTHING, QUANTIZE, NORM_QUANTIZE, SUM_QUANTIZE = (
    tl.constexpr(i) for i in range(4)
)
"""Behind the input gradient: what made the input in the forward pass."""


@triton.jit
def load(ptr, rows, columns, width, row_mask, column_mask, EVEN: tl.constexpr):
    """A tile of a (rows, width) matrix; beyond it zero."""
    places = ptr + rows[:, None] * width + columns[None, :]
    if EVEN:
        found = tl.load(places)
    else:
        mask = row_mask[:, None] & column_mask[None, :]
        found = tl.load(places, mask=mask, other=0.0)
    return found


@triton.jit
def input_rows(m, height, width, STRIDE: tl.constexpr):
    """Row of the input (N, height, width) that row ``m`` of the output of a
    1x1 convolution reads."""
    if STRIDE == 1:
        row = m
    else:
        out_height = (height + STRIDE - 1) // STRIDE
        out_width = (width + STRIDE - 1) // STRIDE
        x = m % out_width
        y = (m // out_width) % out_height
        image = m // (out_width * out_height)
        row = (image * height + y * STRIDE) * width + x * STRIDE
    return row


@triton.jit
def values(
    q, step, QMIN: tl.constexpr, CODES: tl.constexpr, TYPE: tl.constexpr
):
    """What the quantizer gave, from codes above QMIN, or as it is."""
    if CODES:
        value = ((q.to(tl.float32) + QMIN) * step).to(TYPE)
    else:
        value = q
    return value


@triton.jit
def forward_kernel(
    q_ptr,
    step_ptr,
    w_ptr,
    z_ptr,
    partial_ptr,
    rows,
    outputs,
    splits,
    height,
    width,
    K: tl.constexpr,
    QMIN: tl.constexpr,
    CODES: tl.constexpr,
    STRIDE: tl.constexpr,
    REPEATS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``z`` and partial statistics, (2, splits, outputs): the mean and the
    sum of squares around it of the rows of a program."""
    TYPE: tl.constexpr = z_ptr.dtype.element_ty
    columns = tl.cdiv(outputs, COLUMNS)
    split = tl.program_id(0) // columns
    n = (tl.program_id(0) % columns) * COLUMNS + tl.arange(0, COLUMNS)
    exists = n < outputs
    step = tl.load(step_ptr).to(tl.float32)
    k = tl.arange(0, DEPTH)
    ONCE: tl.constexpr = K <= DEPTH
    w = tl.zeros([COLUMNS, DEPTH], dtype=TYPE)
    if ONCE:
        w = load(w_ptr, n, k, K, exists, k < K, EVEN)
    seen = 0.0
    mean = tl.zeros([COLUMNS], dtype=tl.float32)
    squares = tl.zeros([COLUMNS], dtype=tl.float32)
    for i in tl.range(0, REPEATS, num_stages=STAGES):
        m = (split * REPEATS + i) * ROWS + tl.arange(0, ROWS)
        inside = m < rows
        source = input_rows(m, height, width, STRIDE)
        acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        if ONCE:
            q = load(q_ptr, source, k, K, inside, k < K, EVEN)
            acc = tl.dot(values(q, step, QMIN, CODES, TYPE), tl.trans(w), acc)
        else:
            for start in tl.range(0, K, DEPTH, num_stages=STAGES):
                kk = start + k
                q = load(q_ptr, source, kk, K, inside, kk < K, EVEN)
                each = load(w_ptr, n, kk, K, exists, kk < K, EVEN)
                q = values(q, step, QMIN, CODES, TYPE)
                acc = tl.dot(q, tl.trans(each), acc)
        z = acc.to(TYPE)
        places = z_ptr + m[:, None] * outputs + n[None, :]
        if EVEN:
            tl.store(places, z)
        else:
            tl.store(places, z, mask=inside[:, None] & exists[None, :])
        z = z.to(tl.float32)
        here = tl.maximum(
            tl.minimum(rows - (split * REPEATS + i) * ROWS, ROWS), 0
        ).to(tl.float32)
        if not EVEN:
            z = tl.where(inside[:, None], z, 0.0)
        new = tl.sum(z, 0) / tl.maximum(here, 1.0)
        d = z - new[None, :]
        if not EVEN:
            d = tl.where(inside[:, None], d, 0.0)
        # Chan, Golub and LeVeque, 1979: the moments of two groups together
        part = here / (seen + here)
        shift = new - mean
        squares += tl.sum(d * d, 0) + shift * shift * (seen * part)
        mean += shift * part
        seen += here
    out = partial_ptr + split * outputs + n
    tl.store(out, mean, mask=exists)
    tl.store(out + splits * outputs, squares, mask=exists)


@triton.jit
def finish_kernel(
    partial_ptr,
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    rows,
    channels,
    splits,
    each,
    eps,
    momentum,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Mean and 1 / standard deviation, and the running ones, from the partial
    statistics of programs that have ``each`` rows, the last one fewer."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < channels
    start = tl.load(partial_ptr + c, mask=exists, other=0.0)
    total = tl.zeros([SPLITS, CHANNELS], dtype=tl.float32)
    squares = tl.zeros([SPLITS, CHANNELS], dtype=tl.float32)
    first = 0
    while first < splits:  # the interpreter cannot count to a tensor
        offsets, mask = tile(first // SPLITS, c, splits, channels, 1, SPLITS)
        s = first + tl.arange(0, SPLITS)
        count = tl.minimum(rows - s * each, each).to(tl.float32)[:, None]
        mean = tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        d = tl.where(mask, mean - start[None, :], 0.0)
        total += count * d
        squares += count * d * d
        offsets += splits * channels
        squares += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        first += SPLITS
    n = rows * 1.0
    shift = tl.sum(total, 0) / n
    var = tl.maximum(tl.sum(squares, 0) / n - shift * shift, 0.0)
    mean = start + shift
    tl.store(mean_ptr + c, mean, mask=exists)
    tl.store(rstd_ptr + c, 1.0 / tl.sqrt(var + eps), mask=exists)
    old = tl.load(running_mean_ptr + c, mask=exists, other=0.0)
    new = old + momentum * (mean - old)
    tl.store(running_mean_ptr + c, new, mask=exists)
    old = tl.load(running_var_ptr + c, mask=exists, other=0.0)
    new = old + momentum * (var * (n / (n - 1.0)) - old)
    tl.store(running_var_ptr + c, new, mask=exists)


@triton.jit
def codes_kernel(
    z_ptr,
    identity_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    step_ptr,
    x_ptr,
    code_ptr,
    rows,
    channels,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    IDENTITY: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Today's forward kernel, with codes above QMIN for the quantized values:
    batch norm, with IDENTITY a sum, ReLU, ``x`` and the codes of ``x``."""
    TYPE: tl.constexpr = z_ptr.dtype.element_ty
    _, block, c = place(channels, CHANNELS, 1, WIDE)
    offsets, mask = tile(block, c, rows, channels, 1, ROWS)
    mean = load_per_channel(mean_ptr, c, channels)
    rstd = load_per_channel(rstd_ptr, c, channels)
    factor = rstd * load_per_channel(weight_ptr, c, channels)
    bias = load_per_channel(bias_ptr, c, channels)
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    identity = z
    if IDENTITY:
        identity = tl.load(identity_ptr + offsets, mask=mask, other=0.0)
        identity = identity.to(tl.float32)
    x = activation(z, identity, mean, factor, bias, IDENTITY, True, TYPE)
    if IDENTITY:
        tl.store(x_ptr + offsets, x.to(TYPE), mask=mask)
    step = tl.load(step_ptr).to(tl.float32)
    inverse = tl.div_rn(1.0, step)
    v = div_rn_clipped(x, step, inverse, QMIN * 1.0, QMAX * 1.0)
    v = (clip(v, QMIN * 1.0, QMAX * 1.0) + ROUND) - ROUND
    tl.store(code_ptr + offsets, (v - QMIN).to(tl.uint8), mask=mask)


@triton.jit
def grad_of_z(
    grad, z, c, channels, rows, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    step_ptr, sums_ptr, QMIN, QMAX, FRONT: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """The gradient of a batch norm's input, in TYPE, from that of its result;
    with NORM_MASK from that of a ReLU and a quantizer behind it."""
    if FRONT == PLAIN:
        result = grad
    else:
        grad = grad.to(tl.float32)
        z = z.to(tl.float32)
        mean = load_per_channel(mean_ptr, c, channels)
        rstd = load_per_channel(rstd_ptr, c, channels)
        factor = rstd * load_per_channel(weight_ptr, c, channels)
        if FRONT == NORM_MASK:
            bias = load_per_channel(bias_ptr, c, channels)
            step = tl.load(step_ptr).to(tl.float32)
            inverse = tl.div_rn(1.0, step)
            x = activation(z, z, mean, factor, bias, False, True, TYPE)
            grad, _, _ = lsq_grad(
                x, grad, step, inverse, 0.0, QMIN, QMAX, False
            )
            grad = tl.where(x > 0.0, grad, 0.0)
        n = rows * 1.0
        shift = factor * load_per_channel(sums_ptr, c, channels) / n
        weight_sum = load_per_channel(sums_ptr + channels, c, channels)
        slope = factor * rstd * weight_sum / n
        result = tl.fma(factor, grad, -tl.fma(z - mean, slope, shift))
        result = result.to(TYPE)
    return result


@triton.jit
def input_grad_kernel(
    grad_ptr,
    z_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    step_ptr,
    sums_ptr,
    w_ptr,
    grad_z_ptr,
    z_in_ptr,
    x_in_ptr,
    other_ptr,
    mean_in_ptr,
    rstd_in_ptr,
    weight_in_ptr,
    bias_in_ptr,
    step_in_ptr,
    out_ptr,
    partial_ptr,
    rows,
    inputs,
    splits,
    height,
    width,
    K: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    FRONT: tl.constexpr,
    BEHIND: tl.constexpr,
    STORE: tl.constexpr,
    STRIDE: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient ``out`` of what came before the quantizer of the input, and
    partial sums for those of batch norm's bias and weight and of the step,
    (3, splits, inputs); behind QUANTIZE only the step's, (1, splits, inputs).

    A program has ROWS rows. If all K channels fit into DEPTH, what is in front
    is computed once for CHUNKS tiles of COLUMNS. Behind SUM_QUANTIZE, ``x_in``
    is the rectified sum and ``other`` its own gradient; ``out`` is then the
    gradient of the sum. STORE also writes the gradient of the convolution's
    output, ``grad_z``.
    """
    TYPE: tl.constexpr = out_ptr.dtype.element_ty
    columns = tl.cdiv(inputs, COLUMNS * CHUNKS)
    column = tl.program_id(0) % columns
    split = tl.program_id(0) // columns
    m = split * ROWS + tl.arange(0, ROWS)
    inside = m < rows
    k = tl.arange(0, DEPTH)
    ONCE: tl.constexpr = K <= DEPTH
    grad = tl.zeros([ROWS, DEPTH], dtype=TYPE)
    if ONCE:
        grad = load(grad_ptr, m, k, K, inside, k < K, EVEN)
        z = grad
        if FRONT != PLAIN:
            z = load(z_ptr, m, k, K, inside, k < K, EVEN)
        grad = grad_of_z(
            grad, z, k, K, rows, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
            step_ptr, sums_ptr, QMIN, QMAX, FRONT, TYPE,
        )  # fmt: skip
        if STORE:
            first = inside[:, None] & (k < K)[None, :] & (column == 0)
            z_places = grad_z_ptr + m[:, None] * K + k[None, :]
            tl.store(z_places, grad, mask=first)
    target = input_rows(m, height, width, STRIDE)
    for chunk in tl.range(0, CHUNKS, num_stages=STAGES if CHUNKS > 1 else 1):
        n = (column * CHUNKS + chunk) * COLUMNS + tl.arange(0, COLUMNS)
        exists = n < inputs
        acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        if ONCE:
            w = load(w_ptr, k, n, inputs, k < K, exists, EVEN)
            acc = tl.dot(grad, w, acc)
        else:
            for start in tl.range(0, K, DEPTH, num_stages=STAGES):
                kk = start + k
                each = load(grad_ptr, m, kk, K, inside, kk < K, EVEN)
                z = each
                if FRONT != PLAIN:
                    z = load(z_ptr, m, kk, K, inside, kk < K, EVEN)
                w = load(w_ptr, kk, n, inputs, kk < K, exists, EVEN)
                each = grad_of_z(
                    each, z, kk, K, rows, mean_ptr, rstd_ptr, weight_ptr,
                    bias_ptr, step_ptr, sums_ptr, QMIN, QMAX, FRONT, TYPE,
                )  # fmt: skip
                if STORE:
                    first = inside[:, None] & (kk < K)[None, :] & (column == 0)
                    z_places = grad_z_ptr + m[:, None] * K + kk[None, :]
                    tl.store(z_places, each, mask=first)
                acc = tl.dot(each, w, acc)
        g = acc.to(TYPE).to(tl.float32)
        if BEHIND != NOTHING:
            step_in = tl.load(step_in_ptr).to(tl.float32)
            inverse_in = tl.div_rn(1.0, step_in)
            if BEHIND != QUANTIZE:
                z_in = load(z_in_ptr, target, n, inputs, inside, exists, EVEN)
                z_in = z_in.to(tl.float32)
                mean_in = load_per_channel(mean_in_ptr, n, inputs)
            if BEHIND == NORM_QUANTIZE:
                rstd_in = load_per_channel(rstd_in_ptr, n, inputs)
                factor = rstd_in * load_per_channel(weight_in_ptr, n, inputs)
                bias = load_per_channel(bias_in_ptr, n, inputs)
                x = activation(
                    z_in, z_in, mean_in, factor, bias, False, True, TYPE
                )
            else:
                x = load(x_in_ptr, target, n, inputs, inside, exists, EVEN)
                x = x.to(tl.float32)
            g, in_step, _ = lsq_grad(
                x, g, step_in, inverse_in, 0.0, QMIN, QMAX, False
            )
            if BEHIND == SUM_QUANTIZE:
                other = load(other_ptr, m, n, inputs, inside, exists, EVEN)
                g = (g + other.to(tl.float32)).to(TYPE).to(tl.float32)
            if BEHIND != QUANTIZE:
                g = tl.where(x > 0.0, g, 0.0)
            if not EVEN:
                g = tl.where(inside[:, None], g, 0.0)
                in_step = tl.where(inside[:, None], in_step, 0.0)
            at = partial_ptr + split * inputs + n
            if BEHIND != QUANTIZE:
                rstd1 = tl.load(rstd_in_ptr + n, mask=exists, other=0.0)
                tl.store(at, tl.sum(g, 0), mask=exists)
                at += splits * inputs
                weight_sum = tl.sum(g * (z_in - mean_in), 0)
                tl.store(at, weight_sum * rstd1, mask=exists)
                at += splits * inputs
            tl.store(at, tl.sum(in_step, 0), mask=exists)
        out = g.to(TYPE)
        mask = inside[:, None] & exists[None, :]
        places = out_ptr + target[:, None] * inputs + n[None, :]
        if EVEN:
            tl.store(places, out)
        else:
            tl.store(places, out, mask=mask)
        if STRIDE == 2:
            # what the convolution does not read has no gradient
            nothing = tl.zeros([ROWS, COLUMNS], dtype=TYPE)
            right = mask & (target % width + 1 < width)[:, None]
            below = mask & ((target // width) % height + 1 < height)[:, None]
            tl.store(places + inputs, nothing, mask=right)
            places += width * inputs
            tl.store(places, nothing, mask=below)
            tl.store(places + inputs, nothing, mask=right & below)


@triton.jit
def weight_grad_kernel(
    grad_ptr,
    z_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    step_ptr,
    sums_ptr,
    q_ptr,
    step_in_ptr,
    partial_ptr,
    rows,
    outputs,
    inputs,
    height,
    width,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    FRONT: tl.constexpr,
    CODES: tl.constexpr,
    STRIDE: tl.constexpr,
    REPEATS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Partial sums of the gradient of ``w``, (splits, outputs, inputs): a tile
    of ROWS x COLUMNS for each program, DEPTH rows of memory at a time."""
    TYPE: tl.constexpr = grad_ptr.dtype.element_ty
    columns = tl.cdiv(inputs, COLUMNS)
    tiles = columns * tl.cdiv(outputs, ROWS)
    split = tl.program_id(0) // tiles
    place_ = tl.program_id(0) % tiles
    o = (place_ // columns) * ROWS + tl.arange(0, ROWS)
    n = (place_ % columns) * COLUMNS + tl.arange(0, COLUMNS)
    step_in = tl.load(step_in_ptr).to(tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for i in tl.range(0, REPEATS, num_stages=STAGES):
        m = (split * REPEATS + i) * DEPTH + tl.arange(0, DEPTH)
        inside = m < rows
        grad = load(grad_ptr, m, o, outputs, inside, o < outputs, EVEN)
        z = grad
        if FRONT != PLAIN:
            z = load(z_ptr, m, o, outputs, inside, o < outputs, EVEN)
        grad = grad_of_z(
            grad, z, o, outputs, rows, mean_ptr, rstd_ptr, weight_ptr,
            bias_ptr, step_ptr, sums_ptr, QMIN, QMAX, FRONT, TYPE,
        )  # fmt: skip
        source = input_rows(m, height, width, STRIDE)
        q = load(q_ptr, source, n, inputs, inside, n < inputs, EVEN)
        q = values(q, step_in, QMIN, CODES, TYPE)
        if not EVEN:  # code 0 need not be the value 0
            q = tl.where(inside[:, None], q, 0.0)
            grad = tl.where(inside[:, None], grad, 0.0)
        acc = tl.dot(tl.trans(grad), q, acc)
    at = partial_ptr + split * outputs * inputs
    at += o[:, None] * inputs + n[None, :]
    tl.store(at, acc, mask=(o < outputs)[:, None] & (n < inputs)[None, :])
