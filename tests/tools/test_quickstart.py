"""The quick start as it is typed, on its smallest setting."""

import json
import re
import subprocess
import sys

import pytest

from mmauxq.compare.statistics import (
    paired_difference,
    spread,
    with_interval,
)
from tests.conftest import ROOT, process_environment

TOOL = ROOT / 'tools/quickstart.py'
NETWORKS = ['float', 'plain W2A2', 'W2A2 with the module']
HANGS = 600
"""Seconds after which a process is taken to hang."""


def start(*words, cwd):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, words)],
        env=process_environment(), cwd=cwd, capture_output=True, text=True,
        timeout=HANGS,
    )  # fmt: skip


@pytest.mark.slow
def test_the_smallest_setting(tmp_path):
    done = start('--epochs', 2, '--seeds', 3, 4, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    out = tmp_path / 'work_dirs/quickstart'
    assert [path.name for path in tmp_path.iterdir()] == ['work_dirs']

    # how far it is, although there is no terminal
    form = r'\[\d+ s, \d+% done, about \d+ s left\] seed 4: plain W2A2 '
    assert re.search(form, done.stdout)

    # the table holds what the file of results holds
    lines = (out / 'results.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row['network'] for row in rows] == NETWORKS
    for row, before in zip(rows, [None, *rows], strict=False):
        assert row['seeds'] == [3, 4]
        assert row['top1'] == [curve[-1] for curve in row['accuracy']]
        assert re.search(
            f'^{row["network"]} +{spread(row["top1"])} +{row["bytes"]:,}$',
            done.stdout,
            re.MULTILINE,
        )
        if before:
            change = paired_difference(row['top1'], before['top1'])
            assert (
                f'{row["network"]} - {before["network"]}: '
                f'{with_interval(change.mean, change.half_width)}\n'
            ) in done.stdout
    assert rows[0]['bytes'] > 2 * rows[1]['bytes']
    assert rows[1]['bytes'] == rows[2]['bytes']
    assert (out / 'quickstart.png').is_file()

    # the three lines, pasted by the reader
    three = re.search(r'\n((?:.+\n){3})\nThey print: (.+)\n', done.stdout)
    pasted = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', three[1]],
        env=process_environment(), cwd=tmp_path, capture_output=True,
        text=True, timeout=HANGS,
    )  # fmt: skip
    assert pasted.returncode == 0, pasted.stderr
    assert pasted.stdout.splitlines()[-1].endswith(three[2])
    assert three[2] == predicted(out)


def predicted(out):
    """The class that the network of the last checkpoint gives the digit."""
    from mmengine.config import Config

    from mmauxq.deploy.network import load_network

    (checkpoint,) = out.glob('seed3/aux_r8_w2a2_digits/epoch_2.pth')
    config = Config.fromfile(ROOT / 'configs/aux_r8_w2a2_digits.py')
    network = load_network(config, str(checkpoint))
    ((images, _),) = network.images(3)
    return str(int(network.algorithm(images, mode='tensor')[2].argmax()))


@pytest.mark.parametrize(
    'words, message',
    [
        (['--epochs', '1'], "expected an integer from 2, got '1'"),
        (['--seeds'], 'expected one or more different integers, got none'),
        (['--seeds', '1', '1'], 'different integers, got 1 1'),
        (['--seeds', '1.5'], "expected an integer from 0, got '1.5'"),
        (['--seeds', str(2**32)], 'expected integers below 2**32, got'),
        (['--out', 'file/x'], 'expected a folder that can be written, got'),
    ],
)
def test_bad_input_is_one_line(tmp_path, words, message):
    (tmp_path / 'file').write_text('')
    done = start(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, '')
    (line,) = done.stderr.splitlines()
    assert line.startswith('error: ') and message in line


@pytest.mark.parametrize(
    'mean, width, words',
    [
        (1.0, float('inf'), 'one seed says nothing'),
        (1.0, 1.5, 'no difference seen: within the spread of 3 seeds'),
        (-1.0, 1.5, 'no difference seen: within the spread of 3 seeds'),
        (1.0, 0.5, 'better: 0 is outside of the interval'),
        (-1.0, 0.5, 'worse: 0 is outside of the interval'),
    ],
)
def test_a_difference_in_words(monkeypatch, mean, width, words):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    from quickstart import in_words

    assert in_words(mean, width, 3) == words
