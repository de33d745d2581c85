"""LSQ and LSQ+: a learned step and, in LSQ+, a learned offset."""

import torch
from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.registry import MODELS

from .base import Grid, Quantizer, flag, over_ranks
from .functional import MIN_SCALE, clamp_min_ste, learned_step_quantize


class LearnedStepQuantizer(Quantizer):
    """Even levels with a learned distance, the step.

    See :func:`.functional.learned_step_quantize`. Signed values have codes
    ``-2**(bits-1)`` to ``2**(bits-1) - 1`` and 2 bits at least, unsigned ones
    0 to ``2**bits - 1``; weights are signed. Gradients of step and offset are
    scaled by ``1 / sqrt(N qmax)``, with N the number of values of a sample, or
    of a weight, that share a step.

    Attributes:
        step: Distance of the levels, shape (1,) or (num_channels,).
        offset: Value of code 0, same shape; ``None`` for 0.
    """

    scale = 'step'
    step: nn.Parameter
    offset: nn.Parameter | None

    def create_state(self) -> None:
        self.offset = None
        self._set_range(self.role == 'weight')

    def _set_range(self, signed: bool) -> None:
        if signed and self.bits < 2:
            raise UsageError(
                f'{type(self).__name__}: expected at least 2 bits for signed '
                f'values, got bits={self.bits}'
            )
        self.qmin = -(2 ** (self.bits - 1)) if signed else 0
        self.qmax = 2 ** (self.bits - signed) - 1

    def grid(self) -> Grid:
        """Codes qmin to qmax in steps, above the offset."""
        offset = None if self.offset is None else self.offset.detach()
        step = clamp_min_ste(self.step.detach())
        return Grid(step, offset, self.qmin, self.qmax)

    def values_per_scale(self, x: Tensor) -> int:
        """N of the gradient scale (arXiv:1902.08153, section 2.2)."""
        count = x.numel()
        if self.role == 'activation':
            if self.sample_size is not None:
                count = self.sample_size
            elif x.dim() > 1:
                count //= x.shape[0]
        return max(count // (self.num_channels or 1), 1)

    def grad_scale(self, x: Tensor) -> float:
        """Factor on the gradients of step and offset."""
        return (self.values_per_scale(x) * self.qmax) ** -0.5

    def quantize(self, x: Tensor) -> Tensor:
        offset = self.offset
        return learned_step_quantize(
            x,
            self.broadcast(clamp_min_ste(self.step), x),
            self.qmin,
            self.qmax,
            None if offset is None else self.broadcast(offset, x),
            self.grad_scale(x),
        )


@MODELS.register_module()
class LSQ(LearnedStepQuantizer):
    """Even levels with a learned step.

    Weights are signed. Activations are unsigned if the calibration data has
    no negative value. The step starts at ``2 mean|x| / sqrt(qmax)``.
    See :class:`LearnedStepQuantizer`.

    Source: Esser et al., Learned Step Size Quantization, arXiv:1902.08153.
    """

    signed: Tensor

    def create_state(self) -> None:
        super().create_state()
        self.register_buffer('signed', flag(self.role == 'weight'))

    def _read_buffers(self) -> None:
        super()._read_buffers()
        self._set_range(bool(self.signed))

    def set_scales(self, x: Tensor) -> None:
        if self.role == 'activation':
            self.signed.copy_(over_ranks(x.min(), 'min') < 0)
            self._read_buffers()
        mean = over_ranks(self.rows(x).abs().mean(1), 'mean')
        self.step.copy_((2 * mean / self.qmax**0.5).clamp_min(MIN_SCALE))


@MODELS.register_module()
class LSQPlus(LearnedStepQuantizer):
    """Even levels with a learned step and, for activations, a learned offset.

    Activations have codes 0 to ``2**bits - 1`` above the offset (the paper's
    configuration 4), so that signed, skewed values (SiLU, GELU, linear
    bottlenecks) lose no level. Step and offset start where the mean squared
    error on the calibration data is least. Weights are signed without offset
    and their step starts at ``max|mean +- 3 std| / 2**(bits-1)``. See
    :class:`LearnedStepQuantizer`.

    The zeros with which a convolution pads its input come after the
    quantizer. They are no level unless ``offset / step`` is an integer, so
    that the convolution sees up to ``2**bits + 1`` distinct values.

    Source: Bhalgat et al., LSQ+, arXiv:2004.09576, sections 3.1 and 3.2.
    """

    def create_state(self) -> None:
        super().create_state()
        if self.role == 'activation':
            self.offset = self.new_parameter(0.0)

    def set_scales(self, x: Tensor) -> None:
        rows = self.rows(x)
        if self.offset is None:
            mean, std = rows.mean(1), rows.std(1, unbiased=False)
            reach = torch.maximum(
                (mean - 3 * std).abs(), (mean + 3 * std).abs()
            )
            step = over_ranks(reach, 'mean') / 2 ** (self.bits - 1)
            self.step.copy_(step.clamp_min(MIN_SCALE))
            return
        low = over_ranks(rows.amin(1), 'min')
        high = over_ranks(rows.amax(1), 'max')
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
        best = shrink[over_ranks(torch.stack(errors), 'mean').argmin(0)]
        step, offset = self._range(low * best, high * best)
        self.step.copy_(step)
        self.offset.copy_(offset)

    def _range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return ((high - low) / self.qmax).clamp_min(MIN_SCALE), low
