"""Triton kernels between tensors and their codes; see :mod:`.packed`.

Memory is flat: there is one step for all. Byte ``k`` holds element ``k``, or
elements ``2k`` (low half) and ``2k + 1``.
"""

import triton
import triton.language as tl

from .lsq_triton import ROUND, clip, div_rn_clipped


@triton.jit
def _bytes_and_places(
    size, WIDE: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    k = block * BLOCK + tl.arange(0, BLOCK)
    places = k[:, None] * EACH + tl.arange(0, EACH)[None, :]
    return k, places, places < size


@triton.jit
def pack_kernel(
    x_ptr,
    step_ptr,
    offset_ptr,
    code_ptr,
    size,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDE: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes above QMIN of ``size`` elements, EACH of them in a byte."""
    k, places, mask = _bytes_and_places(size, WIDE, EACH, BLOCK)
    step = tl.load(step_ptr).to(tl.float32)
    x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if OFFSET:
        x = x - tl.load(offset_ptr).to(tl.float32)
    v = div_rn_clipped(x, step, tl.div_rn(1.0, step), QMIN * 1.0, QMAX * 1.0)
    v = (clip(v, QMIN * 1.0, QMAX * 1.0) + ROUND) - ROUND
    code = (v - QMIN).to(tl.int32)
    code = tl.where(mask, code, 0) << (4 * tl.arange(0, EACH))[None, :]
    tl.store(code_ptr + k, tl.sum(code, 1).to(tl.uint8), mask=k * EACH < size)


@triton.jit
def unpack_kernel(
    code_ptr,
    step_ptr,
    offset_ptr,
    y_ptr,
    size,
    QMIN: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDE: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``size`` elements from codes of which a byte holds EACH."""
    k, places, mask = _bytes_and_places(size, WIDE, EACH, BLOCK)
    step = tl.load(step_ptr).to(tl.float32)
    byte = tl.load(code_ptr + k, mask=k * EACH < size, other=0).to(tl.int32)
    code = byte[:, None] >> (4 * tl.arange(0, EACH))[None, :]
    if EACH == 2:
        code = code & 15
    value = (code + QMIN).to(tl.float32) * step
    if OFFSET:
        value = value + tl.load(offset_ptr).to(tl.float32)
    tl.store(y_ptr + places, value.to(y_ptr.dtype.element_ty), mask=mask)
