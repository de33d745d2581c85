"""The integer form that all quantizers share."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """What a quantizer can give: ``value = code * scale + offset``.

    Codes are the integers ``qmin, qmin + stride, ..., qmax``. The stride is 1
    but for DoReFa's weights: they lie at odd multiples of ``1 / n``, and no
    integer is the code of zero.

    Args:
        scale: Positive, shape (1,) or (number of channels,).
        offset: Value of code 0, same shape; ``None`` for zero.
        qmin: Lowest code.
        qmax: Highest code.
        stride: Distance of neighbouring codes.
    """

    scale: Tensor
    offset: Tensor | None
    qmin: int
    qmax: int
    stride: int = 1

    @property
    def signed(self) -> bool:
        """Whether codes may be negative."""
        return self.qmin < 0
