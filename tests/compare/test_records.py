"""What a comparison reads back is checked."""

import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmauxq.compare import records
from mmauxq.errors import UsageError
from tests.compare.conftest import record

HONEST = record(peak_memory=7, shared=False, gpu='NVIDIA H100')


@pytest.mark.parametrize(
    'name, value',
    [
        ('arm', '..'),
        ('arm', 'a/b'),
        ('arm', 'a\x1b[2J'),
        ('seed', -1),
        ('seed', 2**32),
        ('seed', True),
        ('seed', 1.0),
        ('final', math.nan),
        ('final', 100.5),
        ('final', '90'),
        ('best', -math.inf),
        ('accuracy', []),
        ('accuracy', 90.0),
        ('accuracy', [50.0, math.nan]),
        ('step_seconds', math.inf),
        ('step_seconds', -0.1),
        ('peak_memory', 1.5),
        ('shared', 0),
        ('gpu', 3),
        ('cost', []),
        ('cost', HONEST['cost'] | dict(parameters=0)),
        ('cost', HONEST['cost'] | dict(shape=['x'])),
        ('cost', dict(shape=[1, 8, 8])),
        ('gradients', dict(joint={'a': 1.0})),
        ('gradients', dict(student={'a': math.nan})),
        ('gradients', dict(student=[1.0])),
    ],
)
def test_a_wrong_field_is_named(tmp_path, name, value):
    line = json.dumps(HONEST | {name: value})
    file = tmp_path / 'results.jsonl'
    file.write_text(f'{json.dumps(HONEST)}\n{line}\n')
    with pytest.raises(UsageError) as error:
        records.read_lines(file)
    message = str(error.value)
    assert message.startswith(f'{file}, line 2: {name}: expected ')
    assert message.isprintable()
    assert records.check_record(HONEST, 'x') == HONEST


@pytest.mark.parametrize('name', sorted(records.FIELDS))
def test_a_missing_field(name):
    short = {key: value for key, value in HONEST.items() if key != name}
    if name in records.LATER:
        records.check_record(short, 'x')
        return
    with pytest.raises(UsageError, match=f'^x: {name}: .* got nothing$'):
        records.check_record(short, 'x')


@pytest.mark.parametrize('seeds', [[-1], [2**32], [0, 1, 0]])
def test_seeds(seeds):
    with pytest.raises(UsageError, match=f'^--seeds: .*{seeds[-1]}'):
        records.check_seeds(seeds)
    records.check_seeds([0, 2**32 - 1])


def result_file(folder, content):
    file = folder / 'plain' / '0' / 'result.json'
    file.parent.mkdir(parents=True)
    file.write_text(content)
    return file


def test_a_record_of_another_run(tmp_path):
    file = result_file(tmp_path, json.dumps(record('aux', 1)))
    with pytest.raises(UsageError, match="arm 'plain', seed 0, got .* seed 1"):
        records.read_result(file)
    file.unlink()
    os.mkdir(file)
    with pytest.raises(UsageError, match='result.json: cannot be read'):
        records.read_result(file)


def test_runs_that_do_not_belong_together():
    longer = record(seed=1) | dict(accuracy=[1.0, 2.0, 3.0])
    other = record(seed=1) | dict(gradients={})
    for runs, message in (
        ([record(), record()], "x: arm 'plain' has seed 0 twice"),
        ([record(), longer], 'seed 1 differs in its epochs or blocks from'),
        ([record(), other], 'seed 1 differs in its epochs or blocks from'),
    ):
        with pytest.raises(UsageError, match=message):
            records.check_together(runs, 'x')
    records.check_together([record(), record(seed=1), record('aux')], 'x')


@given(st.data())
def test_a_changed_file_is_refused_or_in_order(tmp_path_factory, data):
    content = bytearray(json.dumps(HONEST).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(['change', 'cut', 'double']))
        if kind == 'change':
            content[place] = data.draw(st.integers(0, 255))
        elif kind == 'cut':
            del content[place : place + 9]
        else:
            content[place:place] = content[: place + 3]
    file = tmp_path_factory.mktemp('x') / 'results.jsonl'
    file.write_bytes(content)
    try:
        (read,) = records.read_lines(file)
    except UsageError as error:
        assert '\n' not in str(error)
    except ValueError as error:  # a line break came in
        assert 'unpack' in str(error)
    else:
        assert 0 <= read['final'] <= 100 and records.is_arm(read['arm'])


def test_the_compared_metric_must_be_one():
    records.check_metric('a', dict(a=1.0, b=200.0))
    with pytest.raises(UsageError, match="expected .* a, got 'b'"):
        records.check_metric('b', dict(a=1.0, b=200.0))
    with pytest.raises(UsageError, match='there is none'):
        records.check_metric('b', {})


def test_the_commit_of_a_clone_and_none_without_git(monkeypatch, tmp_path):
    commit = records.commit()
    assert commit is None or len(commit) == 40
    monkeypatch.setenv('PATH', str(tmp_path))
    assert records.commit() is None
