"""Quantized tensors, kept as their codes."""

import torch
from torch import Tensor

from .dispatch import is_dense

NIBBLE = 4


class Codes:
    """A quantized tensor in 4 bits for each value, or 8.

    Args:
        x: What :func:`~mmauxq.ops.learned_step_quantize` is given, dense in
            memory.
        step: And the others, as there.
        qmin: Lowest code.
        qmax: Highest code, at most 255 above.
        offset: Value of code 0, or ``None``.

    Raises:
        ValueError: If there are more than 256 codes, or ``x`` has gaps.
    """

    def __init__(
        self,
        x: Tensor,
        step: Tensor,
        qmin: int,
        qmax: int,
        offset: Tensor | None = None,
    ) -> None:
        if qmax - qmin > 255:
            raise ValueError(f'{qmax - qmin + 1} codes; at most 256 fit')
        if not is_dense(x):
            raise ValueError(f'x of strides {x.stride()} has gaps in memory')
        self.step, self.offset, self.qmin = step, offset, qmin
        self.dtype, self.shape, self.strides = x.dtype, x.shape, x.stride()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if offset is not None:
            wide = wide - offset
        codes = (wide / step).round().clamp(qmin, qmax).sub(qmin)
        flat = codes.to(torch.uint8).as_strided((x.numel(),), (1,))
        self.packed = qmax - qmin < 2**NIBBLE
        if self.packed:
            flat = torch.nn.functional.pad(flat, (0, len(flat) % 2))
            flat = flat[0::2] | flat[1::2] << NIBBLE
        self.data = flat

    def value(self) -> Tensor:
        """The quantized tensor, to the bit."""
        flat = self.data
        if self.packed:
            flat = torch.stack([flat & 2**NIBBLE - 1, flat >> NIBBLE], 1)
            flat = flat.flatten()
        codes = flat.as_strided(self.shape, self.strides)
        wide = torch.promote_types(self.dtype, torch.float32)
        value = codes.to(wide).add(self.qmin) * self.step
        if self.offset is not None:
            value = value + self.offset
        return value.to(self.dtype)
