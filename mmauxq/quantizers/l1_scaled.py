"""A weight quantizer whose step is the mean magnitude of the weights."""

import torch
from torch import Tensor

from mmauxq.registry import MODELS

from .base import Grid, Quantizer
from .functional import MIN_SCALE, half_step_quantize


@MODELS.register_module()
class L1ScaledWeight(Quantizer):
    r"""Weights on ``2**bits`` even levels whose distance is not learned.

    Weights are scaled such that their mean magnitude is a constant, clipped to
    [-1, 1], and quantized there:

    .. math::
        w' = \frac{2^{b-1}}{2^b - 1} \frac{w}{\text{mean}|w|} \qquad
        w_q = \frac{2}{n} \left( \text{round}\left( \frac{n}{2}
        (\text{clip}(w', -1, 1) + 1) \right) - \frac{n}{2} \right)
        \qquad n = 2^b - 1

    and scaled back. The levels are the odd multiples of half a step of
    :math:`2^{2-b}\,\text{mean}|w|`: at 2 bits no code is rare, whatever the
    scale of the weights. StatsQ, with a scale of :math:`2\,\text{mean}|w|` as
    half of the range, has the same levels. The mean is a constant for the
    gradient; see :func:`.functional.half_step_quantize`.

    The mean is taken anew in each training step and stays as it is in
    evaluation, where it belongs to what is exported. With
    ``per_channel=True``, as in both papers, each output channel has its own.
    Codes are odd, as those of DoReFa, and take a bit more in ONNX.

    Sources: Liu et al., Nonuniform-to-Uniform Quantization, arXiv:2111.14826;
    Liu et al., Oscillation-free Quantization, arXiv:2302.02210.

    Attributes:
        step: Distance of the levels, shape (1,) or (num_channels,).
    """

    roles = ('weight',)
    step: Tensor

    def create_state(self) -> None:
        self.register_buffer('step', torch.ones(self.num_channels or 1))

    def set_scales(self, x: Tensor) -> None:
        mean = self.rows(x).abs().mean(1)
        # every rank has the same weights
        step = (mean * 2.0 ** (2 - self.bits)).clamp_min(MIN_SCALE)
        self.step.copy_(step)

    def quantize(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.set_scales(x.detach())
        return half_step_quantize(x, self.broadcast(self.step, x), self.bits)

    def grid(self) -> Grid:
        """Odd codes -n to n in units of half a step."""
        n = 2**self.bits - 1
        return Grid(self.step / 2, None, -n, n, stride=2)
