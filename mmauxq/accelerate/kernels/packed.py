"""Quantized tensors, stored as their integer codes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import KERNEL_DTYPES, is_dense, runs_triton, wants_kernel
from .tiles import launch

NIBBLE = 4
BLOCK = 2048
MOST_CODES = 256


def has_codes(x: Tensor, qmin: int, qmax: int) -> bool:
    """Whether a :class:`PackedTensor` holds such a tensor."""
    return is_dense(x) and qmax - qmin < MOST_CODES


class PackedTensor:
    """A quantized tensor in 4 or 8 bits for each value.

    Args:
        x: The tensor before or after quantization, dense in memory.
        step, offset: Of a shape that broadcasts to ``x``.
        qmin: Lowest code.
        qmax: Highest code, at most 255 above ``qmin``.

    Attributes:
        data: The codes above ``qmin``, uint8, flat; two in a byte if they fit.

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
        if not has_codes(x, qmin, qmax):
            raise ValueError(
                f'expected x dense in memory and at most {MOST_CODES} codes, '
                f'got strides {x.stride()} and codes {qmin} to {qmax}'
            )
        self.step = step.detach()
        self.offset = None if offset is None else offset.detach()
        self.qmin, self.qmax = qmin, qmax
        self.dtype, self.shape, self.strides = x.dtype, x.shape, x.stride()
        self.each = 2 if qmax - qmin < 2**NIBBLE else 1
        pack = self._run_pack if self._has_kernel(x) else self._pack
        self.data = pack(x.detach())

    def _has_kernel(self, x: Tensor) -> bool:
        return (
            wants_kernel(x)
            and runs_triton(x)
            and x.numel() > 0
            and self.step.numel() == 1
            and self.dtype in KERNEL_DTYPES
        )

    def value(self) -> Tensor:
        """The quantized tensor, to the bit."""
        if self._has_kernel(self.data):
            return self._run_unpack()
        flat = self.data
        if self.each == 2:
            flat = torch.stack([flat & 2**NIBBLE - 1, flat >> NIBBLE], 1)
            flat = flat.flatten()
        codes = flat.as_strided(self.shape, self.strides)
        wide = torch.promote_types(self.dtype, torch.float32)
        value = codes.to(wide).add(self.qmin) * self.step
        if self.offset is not None:
            value = value + self.offset
        return value.to(self.dtype)

    def _pack(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.offset is not None:
            wide = wide - self.offset
        codes = (wide / self.step).round().clamp(self.qmin, self.qmax)
        codes = codes.sub(self.qmin).to(torch.uint8)
        flat = codes.as_strided((x.numel(),), (1,))
        if self.each == 2:
            flat = F.pad(flat, (0, len(flat) % 2))
            flat = flat[0::2] | flat[1::2] << NIBBLE
        return flat

    def _run_pack(self, x: Tensor) -> Tensor:
        from .packed_triton import pack_kernel

        size = -(-x.numel() // self.each)
        data = torch.empty(size, dtype=torch.uint8, device=x.device)
        self._launch(pack_kernel, x, data, x.numel(), QMAX=self.qmax)
        return data

    def _run_unpack(self) -> Tensor:
        from .packed_triton import unpack_kernel

        data = self.data
        y = data.new_empty_strided(self.shape, self.strides, dtype=self.dtype)
        self._launch(unpack_kernel, data, y, y.numel())
        return y

    def _launch(
        self, kernel: Any, source: Tensor, target: Tensor, size: int,
        **how: int,
    ) -> None:  # fmt: skip
        bytes_ = -(-size // self.each)
        launch(
            kernel, source, -(-bytes_ // BLOCK), source, self.step,
            self.step if self.offset is None else self.offset, target, size,
            QMIN=self.qmin, OFFSET=self.offset is not None, EACH=self.each,
            WIDE=size + 2 * BLOCK >= 2**31, BLOCK=BLOCK, num_warps=8, **how,
        )  # fmt: skip
