"""Max pooling of feature maps with channels last.

Kept for the backward pass is one byte for each maximum: its place in its
window. torch keeps an index of eight bytes, and the input.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _pair

from .dispatch import KERNEL_DTYPES
from .norm import has_kernels
from .tiles import is_wide, laid_out_like, launch, power_of_two

Size = int | Sequence[int]
MOST_TAPS = 255
"""Pixels of a window at the most: a place is a byte."""
MOST_UNROLLED = 64
"""Repetitions in the code of a kernel at the most: it compiles in seconds."""
TILE = (1024, 64)
"""Elements of a tile and channels in it at the most: 16 bytes of bfloat16 for
each thread."""
WARPS = 4


def can_pool(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> bool:
    """Whether :func:`max_pool` takes this call of ``F.max_pool2d``: x is
    (N, C, H, W), channels last, and there are kernels where it is. What torch
    refuses is not taken either."""
    kernel, stride, padding = _pairs(kernel_size, stride, padding)
    return (
        has_kernels(x)
        and x.dim() == 4
        and x.dtype in KERNEL_DTYPES
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and _pair(dilation) == (1, 1)
        and not ceil_mode
        and not return_indices
        and len(kernel) == len(stride) == len(padding) == 2
        and kernel[0] * kernel[1] <= MOST_TAPS
        and stride[0] * max(kernel[1], stride[1]) <= MOST_UNROLLED
        and all(
            min(k, s) > 0 and 0 <= 2 * p <= k <= size + 2 * p
            for size, k, s, p in zip(
                x.shape[2:], kernel, stride, padding, strict=True
            )
        )
    )


def max_pool(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
) -> Tensor:
    """``F.max_pool2d(x, kernel_size, stride, padding)``, to the bit.

    The gradients that reach one pixel are added in float32.

    Args:
        x: (N, C, H, W), channels last; see :func:`can_pool`, which this does
            not ask.
        kernel_size, stride, padding: Of height and width, or one for both.
            The stride is ``kernel_size`` by default.

    Returns:
        Of shape (N, C, OH, OW), channels last.

    Raises:
        RuntimeError: In the backward pass of a backward pass.
    """
    return _MaxPool.apply(x, *_pairs(kernel_size, stride, padding))


def _pairs(
    kernel_size: Size, stride: Size | None, padding: Size
) -> tuple[tuple[int, ...], ...]:
    stride = kernel_size if stride is None else stride
    return _pair(kernel_size), _pair(stride), _pair(padding)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        from .max_pool_triton import forward_kernel

        (kh, kw), (sh, sw), (ph, pw) = kernel, stride, padding
        n, channels, h, w = x.shape
        oh, ow = (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1
        out = torch.empty(
            (n, channels, oh, ow), dtype=x.dtype, device=x.device,
            memory_format=torch.channels_last,
        )  # fmt: skip
        places = torch.empty_like(out, dtype=torch.uint8)
        ctx.shape = x.shape
        ctx.how = dict(
            H=h, W=w, OH=oh, OW=ow, KH=kh, KW=kw, SH=sh, SW=sw, PH=ph, PW=pw,
            WIDE=is_wide(x) or is_wide(out),
        )  # fmt: skip
        _launch(forward_kernel, n * oh * ow, x, out, places, **ctx.how)
        ctx.save_for_backward(places)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from .max_pool_triton import backward_kernel

        (places,) = ctx.saved_tensors
        grad = laid_out_like(grad, places, grad.dtype)
        grad_x = torch.empty(
            ctx.shape, dtype=grad.dtype, device=grad.device,
            memory_format=torch.channels_last,
        )  # fmt: skip
        n, _, h, w = ctx.shape
        how = ctx.how
        cells_h = (h + how['PH'] - 1) // how['SH'] + 1
        cells_w = (w + how['PW'] - 1) // how['SW'] + 1
        _launch(
            backward_kernel, n * cells_h * cells_w, grad, places, grad_x,
            CELLS_H=cells_h, CELLS_W=cells_w, **how,
        )  # fmt: skip
        return grad_x, None, None, None


def _launch(
    kernel: Any, rows: int, x: Tensor, *args: Tensor, **how: Any
) -> None:
    """Run a kernel on tiles of rows x channels."""
    channels = x.shape[1]
    width = min(power_of_two(channels), TILE[1])
    height = TILE[0] // width
    launch(
        kernel, x, -(-rows // height) * -(-channels // width), x, *args, rows,
        C=channels, ROWS=height, CHANNELS=width, num_warps=WARPS, **how,
    )  # fmt: skip
