"""Files that are damaged anywhere: a good result, or one line.

``python -m tests.stress.damage`` tries more of them.
"""

import pytest

from tests.stress.damage import LOADERS, try_all


@pytest.mark.parametrize('loader', LOADERS)
def test_damage_is_one_line_or_does_no_harm(tmp_path, loader):
    outcome = try_all(loader, tmp_path, 150, seed=0)
    assert outcome.failures == []
    assert outcome.refused > 30
    assert outcome.refused + outcome.taken == 150
