"""Quantizers of mmrazor and brevitas as quantizers of this package.

Rounding, clamping, the start of the scales and their gradients are the tools'
own modules. The loop around them is ours, and so is what it does with scales:
they do not decay, and have the learning rate of the weights.
"""

from importlib.util import find_spec

from torch import Tensor, nn

from mmauxq import compat
from mmauxq.errors import UsageError
from mmauxq.quantizers import FLOAT_BITS, Quantizer
from mmauxq.quantizers.base import over_ranks
from mmauxq.registry import MODELS


class PeerQuantizer(Quantizer):
    """A quantizer whose work another tool does.

    One scale for a tensor; weights are signed, activations unsigned.

    Attributes:
        tool: The module of the tool; there is none at 32 bits.

    Args:
        bits: 2 to 8, or 32.
        role: ``'weight'`` or ``'activation'``, the default.

    Raises:
        UsageError: If an argument is out of its range.
    """

    tool: nn.Module

    def __init__(self, bits: int, role: str | None = None) -> None:
        super().__init__(bits, role)

    def create_state(self) -> None:
        if self.bits == FLOAT_BITS:
            return
        if not 2 <= self.bits <= 8:
            raise UsageError(
                f'{type(self).__name__}: expected bits from 2 to 8, got '
                f'bits={self.bits}'
            )
        self.tool = self.make_tool()

    def make_tool(self) -> nn.Module:
        """The module of the tool, for ``bits`` and ``role``."""
        raise NotImplementedError


def mmrazor_quantizer(bits: int, role: str) -> nn.Module:
    """mmrazor's fake quantizer with a learned step, and its observer."""
    compat.enable_mmrazor()
    from mmrazor.models.fake_quants import LearnableFakeQuantize
    from mmrazor.models.observers import LSQObserver
    from mmrazor.structures.quantization.qconfig import QSchemeHandler

    weight = role == 'weight'
    scheme = QSchemeHandler('qint8' if weight else 'quint8', bits, weight)
    return LearnableFakeQuantize(LSQObserver, **scheme.to_observer_params())


@MODELS.register_module()
class MMRazorLSQ(PeerQuantizer):
    """LSQ of mmrazor: ``LearnableFakeQuantize`` with an ``LSQObserver``.

    The step starts at ``2 mean|x| / sqrt(qmax)`` of the first batch, and its
    gradient is scaled by ``1 / sqrt(N qmax)``, with N the number of values of
    the whole batch, where the paper has those of a sample.

    Two settings of mmrazor's LSQ recipe would cost one level of four, and are
    not taken: ``is_symmetric_range`` of the weights, and ``is_symmetry`` of
    the activations, whose zero point would be 1 at 2 bits, with a level below
    zero that no output of a ReLU reaches. That recipe has a scale for each
    channel of a weight, too.

    In mmrazor the loop switches the observer off after the first step; here
    the calibration does, on the same batch.
    """

    def make_tool(self) -> nn.Module:
        return mmrazor_quantizer(self.bits, self.role)

    def set_scales(self, x: Tensor) -> None:
        self.tool.enable_static_estimate()
        self.tool(x)
        scale = self.tool.scale.data
        scale.copy_(over_ranks(scale, 'mean'))
        self.tool.enable_param_learning()

    def quantize(self, x: Tensor) -> Tensor:
        return self.tool(x)


@MODELS.register_module()
class BrevitasLearned(PeerQuantizer):
    """brevitas' usual quantizers of integers, with learned scales.

    Weights: ``Int8WeightPerTensorFloat`` with ``PARAMETER_FROM_STATS``. The
    range is narrow, -1 to 1 at 2 bits, and starts at ``max|w|``.

    Activations: ``Uint8ActPerTensorFloat``. In its first 300 calls in training
    mode, brevitas' default, the range is the 99.999th percentile of the batch,
    and of their moving average in evaluation mode; then it is learned from
    that average on. The pass that calibrates is the first of these calls, on
    the batch of the second one. A short recipe learns little: that of Digits
    has 380 steps.

    Gradients of scales are not scaled. Averages are not those of all ranks:
    train in one process.
    """

    weight, activation = 'LearnedWeight', 'LearnedActivation'

    def make_tool(self) -> nn.Module:
        if find_spec('brevitas') is None:
            raise UsageError(
                f'{type(self).__name__}: needs the package brevitas, which is '
                'not installed: pip install brevitas==0.13.4'
            )
        from . import brevitas_modules as brevitas

        kind = getattr(brevitas, getattr(self, self.role))
        return getattr(brevitas, f'{self.role}_quantizer')(kind, self.bits)

    def set_scales(self, x: Tensor) -> None:
        if self.role == 'weight':
            self.tool(x)

    def quantize(self, x: Tensor) -> Tensor:
        return self.tool(x)[0]


@MODELS.register_module()
class BrevitasBest(BrevitasLearned):
    """brevitas' quantizers of integers, set up for 2 bits.

    Weights: ``Int8WeightPerTensorFloatMSE`` without its narrow range, -2 to 1
    at 2 bits. Activations: ``Uint8ActPerTensorFloatMSE`` with
    ``collect_stats_steps=1`` instead of 300. Both ranges start where brevitas'
    search finds the least squared error, for activations on the first batch as
    for all other quantizers here, and are learned from the first step on.

    Gradients of scales are not scaled; train in one process.
    """

    weight, activation = 'BestWeight', 'BestActivation'
