"""Quantizers with a fixed range."""

import torch
from torch import Tensor

from mmauxq.log import warn
from mmauxq.registry import MODELS

from .base import Grid, Quantizer
from .functional import dorefa_activation, dorefa_weight


@MODELS.register_module()
class DoReFaWeight(Quantizer):
    """Weights on ``2**bits`` even levels of [-1, 1]; nothing is learned.

    See :func:`.functional.dorefa_weight`.

    Source: Zhou et al., DoReFa-Net, arXiv:1606.06160.
    """

    needs_calibration = False
    roles = ('weight',)

    def __init__(self, bits: int, role: str = 'weight') -> None:
        super().__init__(bits, role)

    def quantize(self, x: Tensor) -> Tensor:
        return dorefa_weight(x, self.bits)

    def grid(self) -> Grid:
        """Odd codes -n to n in units of ``1 / n``; none for one bit."""
        if self.bits == 1:
            return super().grid()  # its scale is not fixed
        n = 2**self.bits - 1
        return Grid(torch.tensor([1 / n]), None, -n, n, stride=2)

    def weight_of(self, codes: Tensor) -> Tensor:
        """See the base class; one code must be -n or n, as always."""
        n = 2**self.bits - 1
        # beyond 10 the float32 tanh is 1
        return (codes.float() / n).atanh().clamp(-20, 20)


@MODELS.register_module()
class DoReFaActivation(Quantizer):
    """Activations on ``2**bits`` even levels of [0, 1]; nothing is learned.

    See :func:`.functional.dorefa_activation`. Below 4 bits the fixed range
    costs a post-activation ResNet 10 and more points on ImageNet; the
    constructor warns of it. ``LSQ`` and ``PACTActivation`` learn the range.

    Source: Zhou et al., DoReFa-Net, arXiv:1606.06160.
    """

    needs_calibration = False
    roles = ('activation',)
    _warned = False

    def __init__(self, bits: int, role: str = 'activation') -> None:
        super().__init__(bits, role)
        if bits < 4 and not DoReFaActivation._warned:
            DoReFaActivation._warned = True
            warn(
                f'DoReFaActivation: the fixed range [0, 1] at {bits} bits is '
                'known to collapse on post-activation ResNets; LSQ or '
                'PACTActivation learn the range'
            )

    def quantize(self, x: Tensor) -> Tensor:
        return dorefa_activation(x, self.bits)

    def grid(self) -> Grid:
        """Codes 0 to n in units of ``1 / n``."""
        n = 2**self.bits - 1
        return Grid(torch.tensor([1 / n]), None, 0, n)
