"""The arguments that commands share."""

import pytest

from mmauxq.cli.parser import Parser, add_cfg_options
from mmauxq.errors import UsageError

HOOKS = '[{"type":"SyncBuffersHook"},{"type":"A","rate":0.1}]'


def parse(*words):
    parser = Parser()
    add_cfg_options(parser)
    return parser.parse_args(words).cfg_options


def test_values_are_those_of_mmengine_and_dicts_are_json():
    found = parse(
        '--cfg-options', 'a.b=1e-3', f'hooks={HOOKS}', 'c=[1,x]', 'd=e={f,g}'
    )
    assert found == {
        'a.b': 1e-3,
        'hooks': [
            {'type': 'SyncBuffersHook'},
            {'type': 'A', 'rate': 0.1},
        ],
        'c': [1, 'x'],
        'd': ['e={f', 'g}'],
    }


def test_given_twice():
    found = parse('--cfg-options', 'a={"b":[1]}', '--cfg-options', 'c=2')
    assert found == {'a': {'b': [1]}, 'c': 2}


@pytest.mark.parametrize('value', ['dict(a=1)', '{a: 1}', '[dict(a=1,b=2)]'])
def test_dicts_that_are_not_json(value):
    with pytest.raises(UsageError) as caught:
        parse('--cfg-options', f'model.head={value}')
    assert str(caught.value).startswith(
        '--cfg-options model.head: expected a dict as JSON, such as '
        'model.head={"NAME": 1}, or a value of it, such as model.head.NAME=1, '
        f'got {value!r} ('
    )
