"""How sure a difference between two arms is.

Within a setting runs are paired by their seed. Over several settings the
setting is the unit, because its pairs have network, data and often the float
network in common: all of them together would count as more than they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mmauxq.errors import UsageError


@dataclass(frozen=True)
class PairedDifference:
    """``a - b`` over pairs: runs of one seed, or the means of a setting.

    Args:
        mean: Mean difference.
        half_width: Half of the 95% confidence interval of the mean (Student's
            t, one degree of freedom less than pairs); infinite for a single
            pair.
        wins: Pairs in which ``a`` is above ``b``.
        pairs: Number of pairs.
    """

    mean: float
    half_width: float
    wins: int
    pairs: int

    def __str__(self) -> str:
        shown = with_interval(self.mean, self.half_width)
        return f'{shown}, {self.wins} of {self.pairs} above'


def with_interval(mean: float, half_width: float) -> str:
    """A mean difference and the ends of its interval, if it has one, such as
    ``+0.22 [+0.08, +0.36]``."""
    if half_width == float('inf'):
        return f'{mean:+.2f}'
    return f'{mean:+.2f} [{mean - half_width:+.2f}, {mean + half_width:+.2f}]'


def spread(values: Sequence[float]) -> str:
    """The mean and, of several values, the standard deviation, as text."""
    if len(values) == 1:
        return f'{values[0]:.2f}'
    return f'{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}'


def paired_difference(
    a: Sequence[float], b: Sequence[float]
) -> PairedDifference:
    """Compare two arms by their results, pair by pair in equal order.

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


def clustered_interval(
    clusters: Sequence[Sequence[float]],
) -> tuple[float, float]:
    """The mean of all values, and half of its 95% confidence interval, where
    values of a cluster depend on each other.

    The variance is ``k / (k - 1) sum_j (sum_i (x_ij - mean))^2 / N^2`` for
    ``k`` clusters with ``N`` values in all, which is that of a regression on
    nothing but a constant under the correction CR1; the quantile is Student's
    with ``k - 1`` degrees of freedom. It counts each value alike, the mean of
    the clusters' means each cluster.

    Source: Cameron and Miller, A Practitioner's Guide to Cluster-Robust
    Inference, Journal of Human Resources 50(2), 2015.

    Args:
        clusters: The values of each, at least two clusters.
    """
    count = len(clusters)
    values = np.concatenate([np.asarray(each, float) for each in clusters])
    mean = values.mean()
    sums = np.array([np.sum(np.asarray(each) - mean) for each in clusters])
    variance = count / (count - 1) * (sums**2).sum() / len(values) ** 2
    quantile = stats.t.ppf(0.975, count - 1)
    return float(mean), float(quantile * variance**0.5)
