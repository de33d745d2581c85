import numpy as np
import pytest
from scipy import stats

from mmauxq.compare import paired_difference
from mmauxq.errors import UsageError


def test_against_scipys_interval():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 6))
    found = paired_difference(a, b)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.mean == pytest.approx((low + high) / 2)
    assert found.half_width == pytest.approx((high - low) / 2)
    assert found.wins == int((a > b).sum()) and found.pairs == 6


def test_one_pair_has_no_interval():
    found = paired_difference([1.0], [2.0])
    assert (found.mean, found.half_width) == (-1, float('inf'))
    assert str(found) == '-1.00, 0 of 1 above'


def test_text():
    assert str(paired_difference([2, 4], [1, 1])) == (
        '+2.00 +- 12.71, 2 of 2 above'
    )


@pytest.mark.parametrize('a, b', [([1], []), ([], []), ([1, 2], [1])])
def test_unequal_numbers_of_runs(a, b):
    with pytest.raises(UsageError, match='equal numbers of runs'):
        paired_difference(a, b)
