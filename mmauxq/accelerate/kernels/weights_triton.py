"""Triton kernels that quantize many weights in one launch.

A program works on one row: the weights of one output channel, which lie side
by side in memory. Tables say for each row where it lies and what it needs.
"""

import triton
import triton.language as tl

from .lsq_triton import lsq_grad, quantized


@triton.jit
def forward_kernel(
    weight_ptr,
    step_ptr,
    out_ptr,
    length_ptr,
    qmin_ptr,
    qmax_ptr,
    y_ptr,
    least,
    BLOCK: tl.constexpr,
):
    """Row ``r``: from ``weight[r]`` (an address) to ``y + out[r]``."""
    r = tl.program_id(0)
    weight = tl.load(weight_ptr + r).to(tl.pointer_type(tl.float32))
    step = tl.load(tl.load(step_ptr + r).to(tl.pointer_type(tl.float32)))
    step = tl.maximum(step, least)
    inverse = tl.div_rn(1.0, step)
    y = y_ptr + tl.load(out_ptr + r)
    length = tl.load(length_ptr + r)
    qmin = tl.load(qmin_ptr + r)
    qmax = tl.load(qmax_ptr + r)
    i = 0
    while i < length:
        places = i + tl.arange(0, BLOCK)
        mask = places < length
        w = tl.load(weight + places, mask=mask, other=0.0)
        value = quantized(w, step, inverse, 0.0, qmin, qmax, False)
        tl.store(y + places, value.to(y_ptr.dtype.element_ty), mask=mask)
        i += BLOCK


@triton.jit
def backward_kernel(
    grad_ptr,
    tensor_ptr,
    inside_ptr,
    weight_ptr,
    step_ptr,
    out_ptr,
    length_ptr,
    qmin_ptr,
    qmax_ptr,
    scale_ptr,
    grad_weight_ptr,
    partial_ptr,
    least,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row ``r``: its gradient, and its part of that of the step.

    The gradient of ``y`` begins at ``grad[tensor[r]]`` (an address) plus
    ``inside[r]`` elements of type ``TYPE``.
    """
    r = tl.program_id(0)
    weight = tl.load(weight_ptr + r).to(tl.pointer_type(tl.float32))
    grads = tl.load(grad_ptr + tl.load(tensor_ptr + r))
    grads = grads.to(tl.pointer_type(TYPE)) + tl.load(inside_ptr + r)
    step = tl.load(tl.load(step_ptr + r).to(tl.pointer_type(tl.float32)))
    step = tl.maximum(step, least)
    inverse = tl.div_rn(1.0, step)
    out = grad_weight_ptr + tl.load(out_ptr + r)
    length = tl.load(length_ptr + r)
    qmin = tl.load(qmin_ptr + r)
    qmax = tl.load(qmax_ptr + r)
    in_step = tl.zeros([BLOCK], dtype=tl.float32)
    i = 0
    while i < length:
        places = i + tl.arange(0, BLOCK)
        mask = places < length
        w = tl.load(weight + places, mask=mask, other=0.0)
        grad = tl.load(grads + places, mask=mask, other=0.0).to(tl.float32)
        grad_w, more, _ = lsq_grad(
            w, grad, step, inverse, 0.0, qmin, qmax, False
        )
        tl.store(out + places, grad_w, mask=mask)
        in_step += more
        i += BLOCK
    scale = tl.load(scale_ptr + r)
    tl.store(partial_ptr + r, tl.sum(in_step, 0) * scale)


@triton.jit
def sum_kernel(
    partial_ptr, first_ptr, count_ptr, out_ptr, BLOCK: tl.constexpr
):
    """Step ``s``: the sum over its rows, in a fixed order."""
    s = tl.program_id(0)
    rows = partial_ptr + tl.load(first_ptr + s)
    count = tl.load(count_ptr + s)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    i = 0
    while i < count:
        places = i + tl.arange(0, BLOCK)
        total += tl.load(rows + places, mask=places < count, other=0.0)
        i += BLOCK
    tl.store(out_ptr + s, tl.sum(total, 0))
