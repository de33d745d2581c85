"""The command, called in this process."""

import json
from functools import partial

import pytest

from benchmarks.coverage import __main__ as command
from mmauxq.cli.run_command import run_command

main = partial(run_command, command, prog='python -m benchmarks.coverage')


def test_one_that_passes_and_one_that_is_kept(tmp_path, capsys):
    out = tmp_path / 'new/rows'
    lenet = 'lenet/lenet5_mnist.py'
    assert main(['lenet/*', '--build-only', '--out', str(out)]) == 0
    text = out.with_suffix('.md').read_text()
    assert text in capsys.readouterr().out and '1 of 1 pass.' in text
    lines = out.with_suffix('.jsonl')
    (row,) = map(json.loads, lines.read_text().splitlines())
    assert (row['config'], row['verdict']) == (lenet, 'pass')
    row['quantized'] = 7  # is not tried again
    lines.write_text(json.dumps(row) + '\n')
    refused = 'vision_transformer/vit-base-p16_4xb544-ipu_in1k.py'
    assert main([lenet, refused, '--resume', '--out', str(out)]) == 1
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [r['quantized'] for r in rows] == [7, 0]
    assert rows[1]['reason'] == 'it has no train_cfg'
    assert rows[1]['backbone'] == 'VisionTransformer'


@pytest.mark.parametrize(
    'arguments, line',
    [
        (['no/such*'], "got 'no/such*'"),
        (['--jobs', '0'], 'argument --jobs: expected an integer from 1'),
        (['--timeout', 'x'], 'argument --timeout: invalid float value'),
        (['--nix'], 'unrecognized arguments: --nix'),
    ],
)
def test_bad_options_are_one_line(arguments, line, capsys):
    assert main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith('error: ') and line in error
