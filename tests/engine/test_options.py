"""KEY=VALUE over a config."""

import pytest
from mmengine.config import Config

from mmauxq.engine.options import merge_options
from mmauxq.errors import UsageError


def config() -> Config:
    return Config(
        dict(
            model=dict(depth=20, guidance=None),
            steps=[dict(lr=1, betas=[0.9, 0.99]), dict(lr=2)],
        )
    )


@pytest.mark.parametrize(
    'key, value, found',
    [
        ('model.depth', 56, lambda c: c.model.depth),
        ('model.guidance', 'x', lambda c: c.model.guidance),
        ('model.new.deep', 3, lambda c: c.model.new.deep),
        ('steps.1.lr', 5, lambda c: c.steps[1].lr),
        ('steps.0.betas.1', 0.5, lambda c: c.steps[0].betas[1]),
        ('steps.1', dict(lr=7), lambda c: c.steps[1]),
        ('sync_bn', 'torch', lambda c: c.sync_bn),
        ('randomness.seed', 3, lambda c: c.randomness.seed),
    ],
)
def test_values_are_where_the_keys_say(key, value, found):
    cfg, others = config(), config()
    merge_options(cfg, {key: value}, '--cfg-options')
    assert found(cfg) == value
    top = key.split('.')[0]
    assert all(cfg[k] == v for k, v in others.items() if k != top)
    assert cfg.steps[0].lr == 1 and cfg.steps[0].betas[0] == 0.9


@pytest.mark.parametrize(
    'key, message',
    [
        ('steps.lr', r"steps is a list of 2; allowed are \['steps.0', 'ste"),
        ('steps.2.lr', 'steps is a list of 2'),
        ('steps.0.betas.x', 'steps.0.betas is a list of 2'),
        ('model.depth.x', "model.depth is 20, which has no 'x'"),
        ('model.guidance.type', "model.guidance is None, which has no 'type'"),
        ('self', "neither the config nor a run has 'self'; the "),
        ('steeps.0.lr', "neither the config nor a run has 'steeps'; the "),
    ],
)
def test_keys_that_lead_nowhere_are_one_line(key, message):
    cfg = config()
    with pytest.raises(UsageError, match=f'^arm a: {key}: {message}'):
        merge_options(cfg, {key: 1}, 'arm a:')
    assert cfg._cfg_dict == config()._cfg_dict
