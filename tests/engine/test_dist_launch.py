"""What is said of a job whose ranks died."""

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from mmauxq.engine.dist_launch import _cause


def failures(statuses: dict, seconds: dict) -> dict:
    """As torchrun tells them: status of each rank, and when it was seen."""
    found = {}
    for rank, status in statuses.items():
        found[rank] = ProcessFailure(rank, 0, status, error_file='')
        found[rank].timestamp = 1_700_000_000 + seconds.get(rank, 0)
    return found


@pytest.mark.parametrize(
    'statuses, seconds, cause',
    [
        ({1: -9}, {}, (1, -9)),
        ({0: 1, 1: -9}, {}, (1, -9)),  # rank 0 missed rank 1 and ended
        ({0: 1, 1: -9}, {1: 1}, (1, -9)),  # seen across a full second
        ({0: -15, 1: -9}, {}, (1, -9)),  # the launcher ended rank 0
        ({0: -15, 1: 1}, {}, (1, 1)),
        ({0: 1, 3: 1}, {}, (0, 1)),
        ({2: -11, 1: -9}, {}, (1, -9)),
        # rank 0 waited on its GPU, and the launcher killed it 30 s later
        ({0: -9, 1: -9}, {0: 30}, (1, -9)),
        ({0: -9, 1: 1}, {0: 30}, (1, 1)),
    ],
)
def test_the_rank_that_died_first_is_the_cause(statuses, seconds, cause):
    assert _cause(failures(statuses, seconds)) == cause
