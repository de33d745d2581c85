"""The table of formats, bits and runtimes."""

import importlib.util
import json
from functools import partial

import pytest

from benchmarks.formats import __main__ as command
from benchmarks.formats import forms
from benchmarks.formats.page import cells
from mmauxq.cli.run_command import run_command
from mmauxq.deploy.onnx import latency
from mmauxq.errors import UsageError
from tests.conftest import ROOT

CONFIG = str(ROOT / 'configs/aux_r20_w2a2_digits.py')
OPTIONS = ['--cfg-options', 'model.architecture.backbone.depth=8']
CODES = 2 * 2944
"""Of activations in two images of the digits and eight layers."""
main = partial(run_command, command, prog='python -m benchmarks.formats')


def table_of(capfd, out, *options):
    """The rows that a command writes, by name, and what it printed."""
    args = [CONFIG, '--rounds', '2', '--images', '2', '--out', out, *options]
    assert main([*map(str, args), *OPTIONS]) == 0
    lines = (out / 'formats.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row['arm']: row for row in rows}, capfd.readouterr(), len(rows)


def without(monkeypatch, *packages):
    """Let these packages seem to be missing."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec',
        lambda name, *args: None if name in packages else find(name, *args),
    )  # fmt: skip


def test_forms_of_onnx_runtime(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, 'busy_cores', lambda: 0.7)
    without(monkeypatch, 'openvino')
    options = ['--bits', '2/4', '--forms', 'typed', 'int8', 'packed']
    rows, printed, _ = table_of(capfd, tmp_path, *options)
    typed, int8, packed = (
        rows[f'2/4/{name}']
        for name in ('typed/onnxruntime', 'int8/onnxruntime', 'packed/torch')
    )
    for row in (typed, int8):
        assert row['loads'] and row['runs'] and 'error' not in row
        assert (row['codes'], row['unexplained']) == (CODES, 0)
        assert row['ties'] + row['rounded'] < 5 and row['logits'] < 1e-5
        assert all(value > 0 for value in (*row['speed_up'], row['float_ms']))
        assert row['busy'] == 0.7
    assert typed['weights'] == 'INT2, float' and typed['kernels'] == 0
    assert int8['weights'] == 'INT8, float' and int8['kernels'] == 3
    assert packed['weights'] == '2 bits, float' and 'codes' not in packed
    assert packed['bytes'] < typed['bytes'] < int8['bytes']
    reason = rows['2/4/typed/openvino']['error']
    assert reason == (
        'this needs the package openvino, which is not installed: pip install '
        'openvino'
    )
    page = (tmp_path / 'formats.md').read_text()
    assert page == printed.out and 'images of (C, H, W) = (1, 8, 8)' in page
    assert 'Other processes kept 0.7 cores busy: the speed-ups' in page
    assert 'other processes kept 0.7 cores busy, so that' in printed.err
    line = next(x for x in page.splitlines() if x.startswith('| typed | 2/4'))
    assert line.startswith(
        f'| typed | 2/4 | INT2, float | {typed["bytes"]:,} | '
    )
    assert f' | yes | yes | {CODES:,} | ' in line
    assert line.endswith(' | computes in float |')


def test_the_same_command_again(capfd, tmp_path):
    """Measures what is missing, tells all of it, and mixes no settings."""
    options = ['--bits', '4/16', '--forms', 'packed']
    rows, _, count = table_of(capfd, tmp_path, *options)
    assert list(rows) == ['4/16/packed/torch'] and count == 1
    _, printed, count = table_of(
        capfd, tmp_path, *options, '--bits', '4/16', '8/8'
    )
    assert count == 2 and '| packed | 4/16 |' in printed.out
    assert table_of(capfd, tmp_path, *options)[2] == 2
    assert table_of(capfd, tmp_path, *options, '--images', '3')[2] == 3
    assert table_of(capfd, tmp_path, *options, '--again')[2] == 4


def test_what_is_refused_is_a_row(capfd, tmp_path, monkeypatch):
    """A missing package, and codes that no type holds."""
    without(monkeypatch, 'qonnx', 'litert_torch')
    monkeypatch.setitem(
        forms.FORMS, 'int8', forms.Form(('onnx',), 'model.onnx',
        ('onnxruntime',), ('int8', 'float')),
    )  # fmt: skip
    more = 'model.quantizers.weight.type=mmauxq.DoReFaWeight'
    monkeypatch.setattr(
        'tests.benchmarks.test_formats.OPTIONS', [*OPTIONS, more]
    )
    rows, printed, _ = table_of(
        capfd, tmp_path, '--bits', '8/8', '--forms', 'int8', 'qonnx', 'tflite'
    )
    reasons = {row['form']: row['error'] for row in rows.values()}
    assert 'codes from -255 to 255 fit none of int8' in reasons['int8']
    assert reasons['qonnx'].startswith('this needs the package qonnx')
    assert reasons['tflite'].startswith('this needs the package litert_torch')
    for row in rows.values():
        assert 'loads' not in row and 'speed_up' not in row
        assert f' |  |  |  | {row["error"]} |' in printed.out


def test_a_runtime_that_refuses_the_float_form(monkeypatch):
    def refuses(*args):
        raise UsageError('litert refuses the model (why)')

    monkeypatch.setattr(forms, 'timed', refuses)
    monkeypatch.setattr(forms, '_float', lambda network, runtime: b'')
    row = dict(form='tflite', runtime='litert', runs=True)
    forms.time_rows([row], dict(tflite=b''), _FakeNetwork, 1)
    assert row['error'] == 'litert refuses the model (why)'


class _FakeNetwork:
    class algorithm:
        class cost:
            shape = (1, 8, 8)


def test_cells_of_a_row():
    row = dict(
        form='tflite', bits='4/8', runtime='litert', version='2.3', loads=True,
        runs=False, bytes=250, float_bytes=1000, error='a | b',
    )  # fmt: skip
    assert cells(row) == [
        'tflite', '4/8', '', '250', '25%', 'ai-edge-litert 2.3', 'yes', 'no',
        '', '', '', '', '', '', r'a \| b',
    ]  # fmt: skip


@pytest.mark.parametrize(
    'package, form, runtime, values',
    [
        ('openvino', 'int8', 'openvino', dict(kernels=8, products=8)),
        ('qonnx', 'qonnx', 'qonnx', dict(remark='to check with, not timed')),
        ('litert_torch', 'tflite', 'litert', dict(weights='INT4, float')),
    ],
)
def test_other_runtimes(capfd, tmp_path, package, form, runtime, values):
    pytest.importorskip(package, reason=f'needs the package {package}')
    options = ['--bits', '4/4', '--forms', form]
    row = table_of(capfd, tmp_path, *options)[0][f'4/4/{form}/{runtime}']
    assert row['loads'] and row['runs'] and 'error' not in row
    assert row['codes'] == CODES and not row['unexplained']
    assert row['logits'] < 1e-5
    assert ('speed_up' in row) == (runtime in forms.TIMED)
    assert values.items() <= row.items()


@pytest.mark.parametrize(
    'options, line',
    [
        (['--bits', '5'], '--bits: expected W/A such as 4/8, weights of 1 to'),
        (['--bits', '4/17'], "activations of 1 to 16, got '4/17'"),
        (['--bits', '0/4'], "got '0/4'"),
        (
            ['--bits', '4/4', '--forms', 'nix'],
            "--forms: invalid choice: 'nix'",
        ),
        (['--bits', '4/4', '--rounds', '0'], 'expected an integer from 1'),
        (['--bits', '4/4', '--images', '0'], 'expected an integer from 1'),
        ([], 'the following arguments are required: --bits'),
    ],
)
def test_bad_options_are_one_line(options, line, capfd):
    assert main([CONFIG, *options]) == 2
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith('error: ') and line in error


def test_a_float_network_is_refused(capfd, tmp_path):
    config = str(ROOT / 'configs/float_r20_digits.py')
    assert main([config, '--bits', '4/4', '--out', str(tmp_path)]) == 2
    assert "model.type: expected 'mmauxq.JointQAT'" in capfd.readouterr().err
