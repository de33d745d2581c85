"""How sure a difference between two arms is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mmauxq.errors import UsageError


@dataclass(frozen=True)
class PairedDifference:
    """``a - b`` over runs that share their seed and their start.

    Args:
        mean: Mean difference.
        half_width: Half of the 95% confidence interval of the mean (Student's
            t); infinite for a single pair.
        wins: Pairs in which ``a`` is above ``b``.
        pairs: Number of pairs.
    """

    mean: float
    half_width: float
    wins: int
    pairs: int

    def __str__(self) -> str:
        width = f' +- {self.half_width:.2f}' if self.pairs > 1 else ''
        return f'{self.mean:+.2f}{width}, {self.wins} of {self.pairs} above'


def spread(values: Sequence[float]) -> str:
    """The mean and, of several values, the standard deviation, as text."""
    if len(values) == 1:
        return f'{values[0]:.2f}'
    return f'{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}'


def paired_difference(
    a: Sequence[float], b: Sequence[float]
) -> PairedDifference:
    """Compare two arms by their results, one for each seed in equal order.

    Raises:
        UsageError: If the arms have different numbers of runs, or none.
    """
    if len(a) != len(b) or not len(a):
        raise UsageError(
            'a paired difference: expected equal numbers of runs, at least '
            f'1, got {len(a)} and {len(b)}'
        )
    differences = np.asarray(a, float) - np.asarray(b, float)
    pairs = len(differences)
    half_width = float('inf')
    if pairs > 1:
        # unlike stats.ttest_rel also where all differences are equal
        quantile = stats.t.ppf(0.975, pairs - 1)
        half_width = float(quantile * stats.sem(differences))
    wins = int((differences > 0).sum())
    return PairedDifference(float(differences.mean()), half_width, wins, pairs)
