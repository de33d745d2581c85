import numpy as np
import pytest
from scipy import stats

from mmauxq.compare import paired_difference
from mmauxq.compare.statistics import clustered_interval
from mmauxq.errors import UsageError


def test_against_scipys_interval():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 6))
    difference = paired_difference(a, b)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert difference.mean == pytest.approx((low + high) / 2)
    assert difference.half_width == pytest.approx((high - low) / 2)
    assert difference.wins == int((a > b).sum()) and difference.pairs == 6


@pytest.mark.parametrize('pairs', [2, 3, 9])
def test_against_the_formula(pairs):
    a, b = np.random.default_rng(pairs).normal(90, 1, (2, pairs))
    error = (a - b).std(ddof=1) / pairs**0.5
    expected = stats.t.ppf(0.975, pairs - 1) * error
    difference = paired_difference(a, b)
    assert difference.half_width == pytest.approx(expected, rel=1e-12)
    assert difference.mean == pytest.approx((a - b).mean(), rel=1e-12)


def test_equal_differences():
    assert str(paired_difference([2, 3], [1, 2])) == (
        '+1.00 [+1.00, +1.00], 2 of 2 above'
    )


def test_one_pair_has_no_interval():
    difference = paired_difference([1.0], [2.0])
    assert (difference.mean, difference.half_width) == (-1, float('inf'))
    assert str(difference) == '-1.00, 0 of 1 above'


def test_text():
    assert str(paired_difference([2, 4], [1, 1])) == (
        '+2.00 [-10.71, +14.71], 2 of 2 above'
    )


@pytest.mark.parametrize('a, b', [([1], []), ([], []), ([1, 2], [1])])
def test_unequal_numbers_of_runs(a, b):
    with pytest.raises(UsageError, match='equal numbers of runs'):
        paired_difference(a, b)


def test_clusters_by_hand():
    """Means 1 and 4, all values 2; sums of what is left -3, -1, 4."""
    mean, half_width = clustered_interval([[1, 0, 2], [1.0], [6, 2]])
    assert mean == 2
    # 4.3027 is Student's quantile with 2 degrees of freedom
    error = (3 / 2 * (9 + 1 + 16) / 36) ** 0.5
    assert half_width == pytest.approx(4.30265 * error, rel=1e-5)


@pytest.mark.parametrize('size', [1, 4])
def test_equal_clusters_are_as_sure_as_their_means(size):
    """Whatever the number of values in each: it adds nothing by itself."""
    clusters = np.random.default_rng(0).normal(size=(5, size))
    means = clusters.mean(1)
    low, high = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    mean, half_width = clustered_interval(clusters)
    assert mean == pytest.approx((low + high) / 2)
    assert half_width == pytest.approx((high - low) / 2)
    doubled = clustered_interval(np.repeat(clusters, 2, axis=1))
    assert doubled == pytest.approx((mean, half_width))
