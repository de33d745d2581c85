"""What is said of a job whose ranks died."""

import pytest

from mmauxq.engine.dist_launch import _cause


@pytest.mark.parametrize(
    'statuses, cause',
    [
        ({1: -9}, (1, -9)),
        ({0: 1, 1: -9}, (1, -9)),  # rank 0 missed rank 1 and ended
        ({0: -15, 1: -9}, (1, -9)),  # the launcher ended rank 0
        ({0: -15, 1: 1}, (1, 1)),
        ({0: 1, 3: 1}, (0, 1)),
        ({2: -11, 1: -9}, (1, -9)),
    ],
)
def test_the_killed_rank_is_the_cause(statuses, cause):
    assert _cause(statuses) == cause
