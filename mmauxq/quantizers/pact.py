"""PACT: activations with a learned upper end of the range."""

from torch import Tensor, nn

from mmauxq.log import warn
from mmauxq.registry import MODELS

from .base import Grid, Quantizer, over_ranks
from .functional import MIN_SCALE, clamp_min_ste, pact


@MODELS.register_module()
class PACTActivation(Quantizer):
    """Activations on ``2**bits`` even levels of [0, alpha].

    The paper starts ``alpha`` at a large number and lets an L2 penalty pull it
    down. Here it is not decayed and starts at ``2 mean|x| sqrt(2**bits - 1)``,
    the range that LSQ starts with, or at the largest value of the calibration
    data if that is lower: above it, ``alpha`` would never get a gradient.

    Source: Choi et al., PACT, arXiv:1805.06085.

    Attributes:
        alpha: Upper end of the range, shape (1,) or (num_channels,); the paper
            has one.
    """

    roles = ('activation',)
    scale = 'alpha'
    alpha: nn.Parameter

    def grid(self) -> Grid:
        """Codes 0 to n in steps of ``alpha / n``."""
        n = 2**self.bits - 1
        return Grid(clamp_min_ste(self.alpha.detach()) / n, None, 0, n)

    def set_scales(self, x: Tensor) -> None:
        rows = self.rows(x)
        mean = over_ranks(rows.abs().mean(1), 'mean')
        high = over_ranks(rows.amax(1), 'max')
        alpha = (2 * mean * (2**self.bits - 1) ** 0.5).minimum(high)
        self.alpha.copy_(alpha.clamp_min(MIN_SCALE))
        negative = over_ranks((x < 0).float().mean(), 'mean').item()
        if negative > 0:
            warn(
                f'PACTActivation: {negative:.0%} of the values that reach '
                'this quantizer are negative and become 0; LSQ or LSQPlus '
                'take signed values'
            )

    def quantize(self, x: Tensor) -> Tensor:
        alpha = self.broadcast(clamp_min_ste(self.alpha), x)
        return pact(x, alpha, self.bits)
