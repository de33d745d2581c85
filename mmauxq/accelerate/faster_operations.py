"""Operations that torch has in a slower form."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import space_to_depth
from .kernels.dispatch import product_dtype
from .kernels.max_pool import can_pool, max_pool


class FasterOperations(TorchFunctionMode):
    """While entered, these run in another form, where it takes them: max
    pooling, see :mod:`.kernels.max_pool`; and, in bfloat16, convolutions of
    images with stride 2, see :mod:`.space_to_depth`. Only with gradients.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        form = FORMS.get(func) if torch.is_grad_enabled() else None
        return (form or func)(*args, **(kwargs or {}))


def _max_pool(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    *args: Any,
    **how: Any,
) -> Tensor:
    call = (input, kernel_size, stride, padding)
    if input.requires_grad and can_pool(*call, *args, **how):
        return max_pool(*call)
    return F.max_pool2d(*call, *args, **how)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    *args: Any,
    **how: Any,
) -> Tensor:
    call = (input, weight, bias, stride, padding)
    dtype = product_dtype(input)
    if dtype == torch.bfloat16 and space_to_depth.takes(*call, *args, **how):
        # before the images are copied into blocks
        input, weight = input.to(dtype), weight.to(dtype)
        return space_to_depth.convolve(input, weight, bias, padding)
    return F.conv2d(*call, *args, **how)


FORMS: dict[Callable, Callable] = {
    F.max_pool2d: _max_pool,
    F.conv2d: _conv2d,
}
"""Function of torch -> the same by another form, where that takes the call."""
