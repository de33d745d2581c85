"""LSQ and LSQ+: a learned step and, in LSQ+, a learned offset."""

import torch
from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.registry import MODELS

from .base import FLOAT_BITS, Grid, QParams, Quantizer, flag
from .functional import MIN_SCALE, clamp_min_ste, learned_step_quantize
from .over_ranks import max_over_ranks, mean_over_ranks, min_over_ranks


class LearnedStepQuantizer(Quantizer):
    """Even levels with a learned distance, the step.

    See :func:`.functional.learned_step_quantize`. The gradient of the step is
    scaled by ``1 / sqrt(N qmax)``, with N the number of values of a sample, or
    of a weight, that share a step.

    Args:
        bits: Width in bits, 1 to 8 (signed values: 2 to 8); 32 leaves the
            tensor as it is.
        role: ``'weight'`` or ``'activation'``.
        num_channels: Number of channels with a step each; ``None`` for one
            step.
        channel_axis: Axis of the channels; by default 0 for weights and 1
            for activations.

    Attributes:
        step: Distance of the levels, shape (1,) or (num_channels,).
        offset: Value of code 0, same shape; ``None`` for 0.
    """

    scale = 'step'

    def __init__(
        self,
        bits: int,
        role: str = 'activation',
        num_channels: int | None = None,
        channel_axis: int | None = None,
    ) -> None:
        super().__init__(bits, role, num_channels, channel_axis)
        self.step = self._parameter(torch.ones(num_channels or 1))
        self.offset: nn.Parameter | None = None

    def _parameter(self, value: Tensor) -> nn.Parameter:
        return nn.Parameter(value, self.bits != FLOAT_BITS)

    def _set_range(self, signed: bool) -> None:
        if signed and self.bits < 2:
            raise UsageError(
                f'{type(self).__name__}: expected bits from 2 to 8 for signed '
                f'values, got bits={self.bits}'
            )
        self.qmin = -(2 ** (self.bits - 1)) if signed else 0
        self.qmax = 2 ** (self.bits - signed) - 1

    def grid(self) -> Grid:
        """Codes qmin to qmax in steps, above the offset."""
        offset = None if self.offset is None else self.offset.detach()
        step = clamp_min_ste(self.step.detach())
        return Grid(step, offset, self.qmin, self.qmax)

    def qparams(self, x: Tensor) -> QParams:
        """Step, offset and codes, with the gradient scale of LSQ."""
        scale = (self.values_per_scale(x) * self.qmax) ** -0.5
        return QParams(self.step, self.offset, self.qmin, self.qmax, scale)


@MODELS.register_module()
class LSQ(LearnedStepQuantizer):
    """Even levels with a learned step.

    Signed values have codes ``-2**(bits-1)`` to ``2**(bits-1) - 1``, unsigned
    ones 0 to ``2**bits - 1``. Weights are signed. Activations are unsigned if
    the calibration data has no negative value. The step starts at
    ``2 mean|x| / sqrt(qmax)``; its gradient is scaled by
    ``1 / sqrt(N qmax)``.

    Source: Esser et al., Learned Step Size Quantization, arXiv:1902.08153.

    Args:
        bits: Width in bits, 1 to 8 (signed values: 2 to 8); 32 leaves the
            tensor as it is.
        role: ``'weight'`` or ``'activation'``.
        num_channels: Number of channels with a step each; ``None`` for one
            step.
        channel_axis: Axis of the channels; by default 0 for weights and 1
            for activations.

    Attributes:
        step: Distance of the levels, shape (1,) or (num_channels,).
        signed: Buffer, whether codes may be negative.
    """

    signed: Tensor

    def __init__(
        self,
        bits: int,
        role: str = 'activation',
        num_channels: int | None = None,
        channel_axis: int | None = None,
    ) -> None:
        super().__init__(bits, role, num_channels, channel_axis)
        self.register_buffer('signed', flag(role == 'weight'))
        if self.bits != FLOAT_BITS:
            self._read_buffers()

    def _read_buffers(self) -> None:
        self._set_range(bool(self.signed))

    def set_scales(self, x: Tensor) -> None:
        """Set sign and step from activations, or the step from a weight."""
        if self.role == 'activation':
            self.signed.copy_(min_over_ranks(x.min()) < 0)
            self._read_buffers()
        mean = mean_over_ranks(self.rows(x).abs().mean(1))
        self.step.copy_((2 * mean / self.qmax**0.5).clamp_min(MIN_SCALE))


@MODELS.register_module()
class LSQPlus(LearnedStepQuantizer):
    """Even levels with a learned step and, for activations, a learned offset.

    Activations have codes 0 to ``2**bits - 1`` above the offset (the paper's
    configuration 4), so that signed, skewed values (SiLU, GELU, linear
    bottlenecks) lose no level. Step and offset start where the mean squared
    error on the calibration data is least. Weights are signed without offset
    and their step starts at ``max|mean +- 3 std| / 2**(bits-1)``. Gradients
    are scaled by ``1 / sqrt(N qmax)``.

    The zeros with which a convolution pads its input come after the
    quantizer. They are no level unless ``offset / step`` is an integer, so
    that the convolution sees up to ``2**bits + 1`` distinct values.

    Source: Bhalgat et al., LSQ+, arXiv:2004.09576, sections 3.1 and 3.2.

    Args:
        bits: Width in bits, 1 to 8 (weights: 2 to 8); 32 leaves the tensor as
            it is.
        role: ``'weight'`` or ``'activation'``.
        num_channels: Number of channels with a step and an offset each;
            ``None`` for one.
        channel_axis: Axis of the channels; by default 0 for weights and 1
            for activations.

    Attributes:
        step: Distance of the levels, shape (1,) or (num_channels,).
        offset: Value of code 0, same shape; activations only.
    """

    def __init__(
        self,
        bits: int,
        role: str = 'activation',
        num_channels: int | None = None,
        channel_axis: int | None = None,
    ) -> None:
        super().__init__(bits, role, num_channels, channel_axis)
        if role == 'activation':
            self.offset = self._parameter(torch.zeros(num_channels or 1))
        self._set_range(signed=role == 'weight')

    def set_scales(self, x: Tensor) -> None:
        """Set step and offset from activations, or the step from a weight."""
        rows = self.rows(x)
        if self.offset is None:
            mean, std = rows.mean(1), rows.std(1, unbiased=False)
            reach = torch.maximum(
                (mean - 3 * std).abs(), (mean + 3 * std).abs()
            )
            step = mean_over_ranks(reach) / 2 ** (self.bits - 1)
            self.step.copy_(step.clamp_min(MIN_SCALE))
            return
        low = min_over_ranks(rows.amin(1))
        high = max_over_ranks(rows.amax(1))
        # The paper minimises the error; a grid of ranges that shrink towards
        # zero does that to within a step of the grid, equally on all ranks.
        shrink = torch.linspace(0.1, 1.0, 46, device=x.device)
        errors = []
        for part in shrink:
            step, offset = self._range(low * part, high * part)
            quantized = learned_step_quantize(
                rows, step[:, None], self.qmin, self.qmax, offset[:, None]
            )
            errors.append((quantized - rows).square().mean(1))
        best = shrink[mean_over_ranks(torch.stack(errors)).argmin(0)]
        step, offset = self._range(low * best, high * best)
        self.step.copy_(step)
        self.offset.copy_(offset)

    def _range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return ((high - low) / self.qmax).clamp_min(MIN_SCALE), low
