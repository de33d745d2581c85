"""Convolutions of images with stride 2, by space-to-depth.

cuDNN fills three channels up to eight, and its convolutions with a stride are
slower than those without. With blocks of 2 x 2 pixels as one pixel of 16
channels (a fourth channel is zero), the convolution has half the size and
stride 1. It adds the same products in another order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

CHANNELS = 4
"""Of an image, at most: with 2 x 2 pixels as one these are 16."""
STRIDE = 2


def takes(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> bool:
    """Whether :func:`convolve` takes this call of ``F.conv2d``: of images
    (N, C, H, W), channels last, that need no gradient."""
    return (
        input.dim() == 4
        and not input.requires_grad
        and input.shape[1] <= CHANNELS
        and input.is_contiguous(memory_format=torch.channels_last)
        and _pair(stride) == (STRIDE, STRIDE)
        and _pair(dilation) == (1, 1)
        and groups == 1
        and not isinstance(padding, str)
        and min(weight.shape[2:]) >= STRIDE
        and all(
            k <= size + 2 * p
            for size, k, p in zip(
                input.shape[2:], weight.shape[2:], _pair(padding), strict=True
            )
        )
    )


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int | tuple[int, ...],
) -> Tensor:
    """``F.conv2d(input, weight, bias, 2, padding)``, up to rounding.

    Args:
        input: (N, C, H, W); see :func:`takes`, which this does not ask.
        weight: (O, C, KH, KW).
        bias: (O,), or ``None``.
        padding: Of height and width, or one for both.

    Returns:
        (N, O, OH, OW), channels last.
    """
    x, w = input.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)
    around_x = [0, CHANNELS - input.shape[1]]
    around_w = list(around_x)
    for size, k, p in zip(
        input.shape[:1:-1], weight.shape[:1:-1], _pair(padding)[::-1],
        strict=True,
    ):  # fmt: skip
        # blocks begin at an even pixel, and so the weights as well
        odd = p % STRIDE
        taps = (k + odd + 1) // STRIDE
        last = (size + 2 * p - k) // STRIDE + taps
        around_x += [p + odd, STRIDE * last - size - p - odd]
        around_w += [odd, STRIDE * taps - k - odd]
    return F.conv2d(
        _space_to_depth(F.pad(x, around_x)),
        _space_to_depth(F.pad(w, around_w)),
        bias,
    )


def _space_to_depth(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, 4 C, H / 2, W / 2), channels last."""
    n, h, w, c = x.shape
    blocks = x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(2, 3)
    return blocks.reshape(n, h // 2, w // 2, 4 * c).permute(0, 3, 1, 2)
