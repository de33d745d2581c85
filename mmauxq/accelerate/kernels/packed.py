"""Quantized tensors, stored as their integer codes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import (
    KERNEL_DTYPES,
    is_dense,
    on_device,
    runs_triton,
    wants_kernel,
)

NIBBLE = 4
BLOCK = 2048


class PackedTensor:
    """A quantized tensor in 4 or 8 bits for each value.

    Args:
        x: The tensor before or after quantization, dense in memory.
        step: Distance of the levels, of a shape that broadcasts to ``x``.
        qmin: Lowest code.
        qmax: Highest code, at most 255 above ``qmin``.
        offset: Value of code 0, in the shape of ``step``; ``None`` for 0.

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
        if qmax - qmin > 255:
            raise ValueError(
                f'expected at most 256 codes, got {qmax - qmin + 1}'
            )
        if not is_dense(x):
            raise ValueError(
                f'expected x dense in memory, got strides {x.stride()}'
            )
        self.step, self.offset = step, offset
        self.qmin, self.qmax = qmin, qmax
        self.dtype, self.shape, self.strides = x.dtype, x.shape, x.stride()
        self.each = 2 if qmax - qmin < 2**NIBBLE else 1
        self.data = self._run_pack(x) if self._has_kernel(x) else self._pack(x)

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
        with on_device(x):
            pack_kernel[(-(-size // BLOCK),)](
                x,
                self.step,
                self.step if self.offset is None else self.offset,
                data,
                x.numel(),
                QMIN=self.qmin,
                QMAX=self.qmax,
                **self._arguments(x.numel()),
            )
        return data

    def _run_unpack(self) -> Tensor:
        from .packed_triton import unpack_kernel

        y = torch.empty_strided(
            self.shape,
            self.strides,
            dtype=self.dtype,
            device=self.data.device,
        )
        with on_device(y):
            unpack_kernel[(-(-len(self.data) // BLOCK),)](
                self.data,
                self.step,
                self.step if self.offset is None else self.offset,
                y,
                y.numel(),
                QMIN=self.qmin,
                **self._arguments(y.numel()),
            )
        return y

    def _arguments(self, size: int) -> dict:
        return dict(
            OFFSET=self.offset is not None,
            WIDE=size + 2 * BLOCK >= 2**31,
            EACH=self.each,
            BLOCK=BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )
