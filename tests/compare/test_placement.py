"""Runs spread over GPUs; the GPUs are feigned, the processes are real."""

import json
import sys
import time

import pytest
import torch

from mmauxq.compare import comparison
from mmauxq.compare.placement import CONTEXT, Placement, Run, find_gpus
from mmauxq.errors import UsageError

GIB = 2**30

CHILD = """#!/bin/sh
# called as: -m mmauxq.compare.training_run FOLDER SEED
echo "$CUDA_VISIBLE_DEVICES" >> "$3/seen"
if [ -e "$3/report" ]; then cp "$3/report" "$3/memory"; fi
until [ -e "$3/end" ]; do sleep 0.02; done
if [ -s "$3/end" ]; then
    cat "$3/end"
    rm "$3/end"
    exit 1
fi
echo '{}' > "$3/result.json"
"""
"""Ends when a file ``end`` is there; with what is in it as its error."""


@pytest.fixture
def children(tmp_path, monkeypatch):
    """The processes of runs are those of CHILD."""
    program = tmp_path / 'child.sh'
    program.write_text(CHILD)
    program.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(program))
    sleep, ticks = time.sleep, iter(range(2000))

    def tick(seconds):
        assert next(ticks, None) is not None, 'the comparison hangs'
        sleep(0.02)

    monkeypatch.setattr(comparison.time, 'sleep', tick)


def make_runs(folder, *names):
    """Names such as ``'a0'``: arm and seed."""
    runs = [Run(name[0], int(name[1]), folder / name) for name in names]
    for run in runs:
        run.folder.mkdir()
    return runs


def end(*runs, error=''):
    for run in runs:
        (run.folder / 'end').write_text(error)


def seen(run):
    return (run.folder / 'seen').read_text().splitlines()


def until(active, condition):
    """Go on until the runs under way are as asked for."""
    for now in active:
        if condition(now):
            return now
    raise AssertionError('the comparison ended before')


@pytest.mark.parametrize(
    'visible, count, most, expected',
    [
        (None, 3, None, ['0', '1', '2']),
        (None, 3, 2, ['0', '1']),
        (None, 3, 0, []),
        (None, 0, None, []),
        ('', 0, None, []),
        ('3, 1', 2, None, ['3', '1']),
        ('3,1', 2, 1, ['3']),
        ('GPU-ab,GPU-cd', 2, None, ['GPU-ab', 'GPU-cd']),
        # CUDA stops at the first that there is not
        ('1,9,0', 1, None, ['1']),
    ],
)
def test_the_gpus_that_are_visible(
    monkeypatch, visible, count, most, expected
):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    assert find_gpus(most) == expected


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(UsageError, match='expected at most 2, .* got 3'):
        find_gpus(3)


def test_each_run_has_a_gpu_of_its_own(tmp_path, children):
    runs = make_runs(tmp_path, 'a0', 'b0', 'a1', 'b1')
    gpus = ['GPU-ab', '3']
    active = comparison.train(runs, 1, gpus=gpus)
    assert next(active) == {runs[0]: 'gpu 0', runs[1]: 'gpu 1'}
    end(runs[1])
    now = until(active, lambda now: runs[2] in now)
    assert now == {runs[0]: 'gpu 0', runs[2]: 'gpu 1'}
    end(*runs)
    assert list(active)[-1] == {}
    assert [seen(run) for run in runs[:3]] == [['GPU-ab'], ['3'], ['3']]
    assert seen(runs[3])[0] in gpus
    assert not any(run.shared.exists() for run in runs)


@pytest.mark.parametrize('jobs', [1, 2])
def test_without_a_gpu(tmp_path, children, monkeypatch, jobs):
    """Also where there is one, which the runs must not see."""
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '5')
    runs = make_runs(tmp_path, 'a0', 'b0', 'a1')
    active = comparison.train(runs, jobs)
    assert next(active) == dict.fromkeys(runs[:jobs], '')
    end(*runs)
    assert list(active)[-1] == {}
    assert [seen(run) for run in runs] == [['']] * 3
    assert runs[0].shared.exists() == (jobs > 1)


def test_a_second_run_waits_for_the_memory_of_the_first(tmp_path, children):
    runs = make_runs(tmp_path, 'a0', 'b0', 'a1')
    active = comparison.train(runs, 3, gpus=['0'])
    for _ in range(5):  # what the first takes is not known
        assert list(next(active)) == runs[:1]
    room = CONTEXT + GIB
    memory = runs[0].folder / 'memory'
    memory.write_text(f'{room - 1} {GIB}')
    for _ in range(5):
        assert list(next(active)) == runs[:1]
    memory.write_text(f'{room} {GIB}')
    now = until(active, lambda now: len(now) > 1)
    assert now == {runs[0]: 'gpu 0', runs[1]: 'gpu 0'}
    for _ in range(5):  # the second has not reported yet
        assert list(next(active)) == runs[:2]
    assert [run.shared.exists() for run in runs] == [True, True, False]
    # the third is of the first's arm; the least that is free counts
    (runs[1].folder / 'memory').write_text(f'{room - 1} 1')
    for _ in range(5):
        assert list(next(active)) == runs[:2]
    end(runs[1])
    until(active, lambda now: runs[2] in now)
    end(*runs)
    assert list(active)[-1] == {}


def test_runs_go_where_the_fewest_are(tmp_path):
    runs = make_runs(tmp_path, *(f'a{i}' for i in range(6)))
    places = Placement(runs, ['4', '7'], 2)

    def add(run):
        where = places.add(run)
        if where is not None:
            (run.folder / 'memory').write_text(f'{9 * GIB} {GIB}')
        return where

    assert [add(run) for run in runs[:5]] == ['4', '7', '4', '7', None]
    places.remove(runs[1])
    assert add(runs[4]) == '7'
    # one GPU has room, the other has not
    places.remove(runs[0])
    places.remove(runs[4])
    (runs[2].folder / 'memory').write_text(f'{GIB} {GIB}')
    assert add(runs[5]) == '7'


def test_a_run_needs_what_its_arm_did(tmp_path):
    """Of an arm that has not run yet, the most of any other counts."""
    runs = make_runs(tmp_path, 'a0', 'b0', 'a1', 'c0')
    places = Placement(runs, ['0'], 3)
    assert places.add(runs[0]) == '0'
    (runs[0].folder / 'memory').write_text(f'{CONTEXT + GIB} {GIB}')
    (runs[1].folder / 'memory').write_text(f'0 {2 * GIB}')
    assert places.add(runs[3]) is None
    assert places.add(runs[2]) == '0'


def test_runs_that_have_room_need_not_wait_for_each_other(tmp_path):
    """What runs take that have not reported yet is set aside for them."""
    runs = make_runs(tmp_path, 'a0', 'b0', 'a1', 'b1')
    places = Placement(runs, ['0'], 4)
    assert places.add(runs[0]) == '0'
    assert places.add(runs[1]) is None
    (runs[0].folder / 'memory').write_text(f'{2 * (CONTEXT + GIB)} {GIB}')
    assert [places.add(run) for run in runs[1:]] == ['0', '0', None]
    (runs[1].folder / 'memory').write_text(f'{9 * GIB} {2 * GIB}')
    assert places.add(runs[3]) is None  # the least that is free counts
    (runs[0].folder / 'memory').write_text(f'{9 * GIB} {GIB}')
    assert places.add(runs[3]) == '0'


def test_what_another_process_left_does_not_count(tmp_path):
    (run,) = make_runs(tmp_path, 'a0')
    run.shared.touch()
    (run.folder / 'memory').write_text('1 1')
    assert Placement([run], ['0'], 2).add(run) == '0'
    assert not run.shared.exists()
    assert run.memory is None


@pytest.mark.parametrize(
    'error',
    [
        'torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB',
        'RuntimeError: CUDA error: out of memory\nCompile with `X`',
        'RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling',
    ],
)
def test_out_of_memory_beside_others_is_tried_again_alone(
    tmp_path, children, error
):
    runs = make_runs(tmp_path, 'a0', 'b0', 'a1')
    for run in runs:
        (run.folder / 'report').write_text(f'{9 * GIB} {GIB}')
    active = comparison.train(runs, 2, gpus=['6'])
    until(active, lambda now: list(now) == runs[:2])
    end(runs[1], error=error)
    until(active, lambda now: list(now) == [runs[0], runs[2]])
    end(runs[0])
    for _ in range(5):
        assert runs[1] not in next(active)  # it waits for the third to end
    end(runs[2])
    until(active, lambda now: list(now) == [runs[1]])
    assert not runs[1].shared.exists()
    end(runs[1])
    assert list(active)[-1] == {}
    assert seen(runs[1]) == ['6', '6']
    assert json.loads(runs[1].result.read_text()) == {}


def test_nobody_joins_a_run_that_is_tried_alone(tmp_path):
    runs = make_runs(tmp_path, 'a0', 'b0')
    places = Placement(runs, ['0'], 2)
    places.alone.add(runs[0])
    assert places.add(runs[0]) == '0'
    (runs[0].folder / 'memory').write_text(f'{9 * GIB} {GIB}')
    assert places.add(runs[1]) is None


def test_out_of_memory_alone_ends_the_comparison(tmp_path, children):
    runs = make_runs(tmp_path, 'a0', 'b0')
    for run in runs:
        (run.folder / 'report').write_text(f'{9 * GIB} {GIB}')
    active = comparison.train(runs, 2, gpus=['0'])
    until(active, lambda now: list(now) == runs)
    lack = 'torch.OutOfMemoryError: CUDA out of memory.'
    end(runs[1], error=lack)
    until(active, lambda now: list(now) == runs[:1])
    end(runs[0])
    until(active, lambda now: list(now) == runs[1:])
    end(runs[1], error=lack)
    with pytest.raises(UsageError, match="'b', seed 0 failed: .*OutOfMemory"):
        list(active)
    assert seen(runs[1]) == ['0', '0']


def test_another_failure_beside_others_ends_the_comparison(tmp_path, children):
    runs = make_runs(tmp_path, 'a0', 'b0')
    active = comparison.train(runs, 1, gpus=['0', '1'])
    assert list(next(active)) == runs
    end(runs[1], error='ValueError: no')
    with pytest.raises(UsageError, match='seed 0 failed: ValueError: no'):
        list(active)
    assert seen(runs[1]) == ['1']


@pytest.mark.parametrize(
    'content', [b'', b'1', b'1 2 3', b'1e3 4', b'1 \xff', b'9' * 5000 + b' 1']
)
def test_numbers_that_are_damaged_are_not_there(tmp_path, content):
    run = comparison.Run('a', 0, tmp_path)
    for name in ('progress', 'memory'):
        (tmp_path / name).write_bytes(content)
    assert (run.progress, run.memory) == ((0, 0), None)
    (tmp_path / 'progress').write_text('3 7')
    assert run.progress == (3, 7)
