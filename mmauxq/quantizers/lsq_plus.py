"""LSQ+: a learned step and a learned offset."""

import torch
from torch import Tensor, nn

from mmauxq import ops
from mmauxq.errors import UsageError
from mmauxq.registry import MODELS

from .base import FLOAT_BITS, Quantizer, extreme_over_ranks, mean_over_ranks
from .grid import Grid


@MODELS.register_module()
class LSQPlus(Quantizer):
    """Even levels with a learned distance and, for activations, offset.

    Activations take codes 0 to ``2**bits - 1`` above a learned offset (the
    paper's configuration 4), so that signed, skewed values (SiLU, GELU, linear
    bottlenecks) lose no level; step and offset start where the mean squared
    error of the first batch is least. Weights are signed without offset and
    start at ``max|mean +- 3 std| / 2**(bits-1)``. Gradients are scaled as in
    LSQ. See :func:`mmauxq.ops.learned_step_quantize`.

    Source: Bhalgat et al., LSQ+, arXiv:2004.09576, sections 3.1 and 3.2.

    Args:
        bits: Width in bits, 1 to 8 (weights: 2 to 8); 32 leaves the tensor as
            it is.
        role: ``'weight'`` or ``'activation'``.
        num_channels: One step (and offset) per channel; ``None`` for one.
        channel_axis: Axis of the channels.

    Attributes:
        step: Distance of the levels, shape (1,) or (num_channels,).
        offset: Value of code 0, same shape; activations only.
    """

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
        self.offset: nn.Parameter | None = None
        if role == 'activation':
            self.offset = nn.Parameter(
                torch.zeros(num_channels or 1), self.bits != FLOAT_BITS
            )
            self.qmin, self.qmax = 0, 2**self.bits - 1
        else:
            if self.bits < 2:
                raise UsageError(
                    f'LSQPlus: bits={bits} for weights; allowed '
                    f'are 2 to 8, and {FLOAT_BITS}'
                )
            self.qmin = -(2 ** (self.bits - 1))
            self.qmax = 2 ** (self.bits - 1) - 1

    def grid(self) -> Grid:
        """Codes qmin to qmax in steps, above the offset."""
        offset = None if self.offset is None else self.offset.detach()
        return Grid(
            ops.lower_bound(self.step.detach()), offset, self.qmin, self.qmax
        )

    def calibrate(self, x: Tensor) -> None:
        """Set step and offset from a batch, or the step from the weights."""
        rows = self._per_scale(x)
        if self.offset is None:
            mean, std = rows.mean(1), rows.std(1, unbiased=False)
            reach = torch.maximum(
                (mean - 3 * std).abs(), (mean + 3 * std).abs()
            )
            self.step.copy_(
                (mean_over_ranks(reach) / 2 ** (self.bits - 1)).clamp_min(
                    ops.LEAST_SCALE
                )
            )
            return
        low = extreme_over_ranks(rows.amin(1), 'min')
        high = extreme_over_ranks(rows.amax(1), 'max')
        # The paper minimises the error; a grid of shrunk ranges does that
        # to within a step of the grid, and is the same on all ranks.
        shrink = torch.linspace(0.1, 1.0, 46, device=x.device)
        errors = []
        for part in shrink:
            step, offset = self._range(low * part, high * part)
            quantized = ops.learned_step_quantize(
                rows, step[:, None], self.qmin, self.qmax, offset[:, None]
            )
            errors.append((quantized - rows).square().mean(1))
        best = shrink[mean_over_ranks(torch.stack(errors)).argmin(0)]
        step, offset = self._range(low * best, high * best)
        self.step.copy_(step)
        self.offset.copy_(offset)

    def _range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return ((high - low) / self.qmax).clamp_min(ops.LEAST_SCALE), low

    def quantize(self, x: Tensor) -> Tensor:
        """``x`` to the offset plus multiples of the step."""
        offset = None if self.offset is None else self._spread(self.offset, x)
        return ops.learned_step_quantize(
            x,
            self._spread(ops.lower_bound(self.step), x),
            self.qmin,
            self.qmax,
            offset,
            grad_scale=(self._values_per_scale(x) * self.qmax) ** -0.5,
        )
