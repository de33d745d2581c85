"""Settings with which MMEngine's hook would never save, or fail then."""

import pytest

from mmauxq.engine.hooks import SafeCheckpointHook
from mmauxq.errors import UsageError


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(interval=0), 'interval: expected an integer from 1, got 0'),
        (dict(interval=-3), 'interval: expected an integer from 1, got -3'),
        (dict(interval=None), 'interval: expected an integer from 1, got No'),
        (dict(max_keep_ckpts=0.5), 'ckpts: expected an integer from -1, got'),
        (dict(no_such=1), "checkpoint: expected .*got .'no_such'."),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        SafeCheckpointHook(**settings)


def test_never_and_all():
    hook = SafeCheckpointHook(interval=-1, max_keep_ckpts=-1)
    assert (hook.interval, hook.max_keep_ckpts) == (-1, -1)
