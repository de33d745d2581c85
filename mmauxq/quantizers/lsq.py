"""LSQ: a learned step, for weights and activations."""

import torch
from torch import Tensor, nn

from mmauxq import ops
from mmauxq.errors import UsageError
from mmauxq.registry import MODELS

from .base import (
    FLOAT_BITS,
    Quantizer,
    extreme_over_ranks,
    flag,
    mean_over_ranks,
)
from .grid import Grid


@MODELS.register_module()
class LSQ(Quantizer):
    """Even levels with a learned distance, the step.

    Signed values take codes ``-2**(bits-1)`` to ``2**(bits-1) - 1``, unsigned
    ones 0 to ``2**bits - 1``; weights are signed, and for activations the
    first batch decides (no negative value: unsigned). The step starts at
    ``2 mean|x| / sqrt(qmax)`` and its gradient is scaled by
    ``1 / sqrt(N qmax)``. See :func:`mmauxq.ops.learned_step_quantize`.

    Source: Esser et al., Learned Step Size Quantization, arXiv:1902.08153.

    Args:
        bits: Width in bits, 1 to 8 (signed: 2 to 8); 32 leaves the tensor as
            it is.
        role: ``'weight'`` or ``'activation'``.
        num_channels: One step per channel; ``None`` for one in all.
        channel_axis: Axis of the channels.

    Attributes:
        step: Distance of the levels, shape (1,) or (num_channels,).
        signed: Buffer, whether codes may be negative.
    """

    signed: Tensor
    scale = 'step'

    def __init__(
        self,
        bits: int,
        role: str = 'activation',
        num_channels: int | None = None,
        channel_axis: int = 0,
    ) -> None:
        super().__init__(bits, role, num_channels, channel_axis)
        self.step = nn.Parameter(
            torch.ones(num_channels or 1), self.bits != FLOAT_BITS
        )
        self.register_buffer('signed', flag(role == 'weight'))
        if self.bits != FLOAT_BITS:
            self._restore()

    def _restore(self) -> None:
        signed = bool(self.signed)
        if signed and self.bits < 2:
            raise UsageError(
                f'LSQ: bits={self.bits} for signed values; allowed are 2 to 8'
            )
        self.qmin = -(2 ** (self.bits - 1)) if signed else 0
        self.qmax = 2 ** (self.bits - signed) - 1

    def grid(self) -> Grid:
        """Codes qmin to qmax, in steps."""
        return Grid(
            ops.lower_bound(self.step.detach()), None, self.qmin, self.qmax
        )

    def calibrate(self, x: Tensor) -> None:
        """Set sign and step from a batch of activations, or the weights."""
        if self.role == 'activation':
            self.signed.copy_(extreme_over_ranks(x.min(), 'min') < 0)
            self._restore()
        mean = mean_over_ranks(self._per_scale(x).abs().mean(1))
        self.step.copy_((2 * mean / self.qmax**0.5).clamp_min(ops.LEAST_SCALE))

    def quantize(self, x: Tensor) -> Tensor:
        """``x`` to multiples of the step."""
        return ops.learned_step_quantize(
            x,
            self._spread(ops.lower_bound(self.step), x),
            self.qmin,
            self.qmax,
            grad_scale=(self._values_per_scale(x) * self.qmax) ** -0.5,
        )
