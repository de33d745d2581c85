"""Which part of a config an error is located in."""

import pytest
from mmengine.config import Config

from mmauxq.engine.error_context import locate

CONFIG = dict(
    model=dict(type='A', head=dict(type='B', width=3)),
    train=dict(dataset=dict(type='D', root='x')),
    val=dict(dataset=dict(type='D', root='x')),
    hooks=[dict(type='H'), 7],
    randomness=dict(seed='abc'),
    log_level='loud',
)


def fail(*args, **kwargs):
    raise ValueError('no')


def outer(section, inner):
    inner(section)


def with_one(seed):
    fail()


def level(log_level):
    fail()


def of_another_name(x):
    fail()


def two(a, b):
    fail()


@pytest.mark.parametrize(
    'call, where',
    [
        (lambda c: of_another_name(c.model.head),
         "model.head={'type': 'B', 'width': 3}"),
        # what a builder adds to a section
        (lambda c: of_another_name({**c.model.head, 'more': 1}),
         "model.head={'type': 'B', 'width': 3}"),
        # the innermost function counts
        (lambda c: outer(c.model, lambda model: of_another_name(c.model.head)),
         "model.head={'type': 'B', 'width': 3}"),
        (lambda c: of_another_name(c.hooks), "hooks=[{'type': 'H'}, 7]"),
        # another value under the name of its key
        (lambda c: with_one('abc'), "randomness={'seed': 'abc'}"),
        (lambda c: level('loud'), "log_level='loud'"),
        # cannot be told
        (lambda c: of_another_name('abc'), ''),
        (lambda c: with_one('abd'), ''),
        (lambda c: of_another_name(c.train.dataset), ''),
        (lambda c: two(c.model.head, c.randomness), ''),
        (lambda c: fail(), ''),
    ],
)  # fmt: skip
def test_the_section_that_the_innermost_function_had(call, where):
    cfg = Config(CONFIG)
    with pytest.raises(ValueError) as caught:
        call(cfg)
    assert locate(caught.value, cfg._cfg_dict) == where


def test_long_sections_are_cut():
    cfg = Config(dict(a=dict(x='y' * 300)))
    with pytest.raises(ValueError) as caught:
        of_another_name(cfg.a)
    text = locate(caught.value, cfg._cfg_dict)
    assert text.startswith("a={'x': 'yyy") and text.endswith('...')
    assert len(text) == len('a=') + 160
