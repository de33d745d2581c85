import numpy as np
import pytest

from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.deploy.onnx import latency
from tests.commands import latency_command
from tests.deploy.conftest import CONFIG, OPTIONS


def test_runners_take_turns():
    calls = []
    runners = {name: lambda x, n=name: calls.append(n) for name in 'ab'}
    seconds = latency.latencies(runners, (2, 1, 4, 4), rounds=3)
    assert ''.join(calls) == 'ab' * 5  # two rounds are not timed
    assert set(seconds) == {'a', 'b'} and min(seconds.values()) >= 0


def test_the_table(capfd, tmp_path):
    file = tmp_path / 'network.pth'
    args = [CONFIG, '--batch', 2, '--threads', 1, '--rounds', 1,
            '--save', file, *OPTIONS]  # fmt: skip
    assert latency_command([str(a) for a in args]) == 0
    rows = [
        [cell.strip() for cell in line.split('|')[1:-1]]
        for line in capfd.readouterr().out.splitlines()
        if line.startswith('| onnxruntime')
    ]
    assert [(r[3], int(r[4])) for r in rows] == [
        ('float', 0), ('typed', 0), ('int8', 3), ('int8, residual int8', 8)
    ]  # fmt: skip
    assert rows[0][6] == '1.00' and all(float(r[5]) >= 0 for r in rows)
    state = read_checkpoint(file)['state_dict']
    calibrated = [v for k, v in state.items() if k.endswith('calibrated')]
    assert len(calibrated) == 16 and all(calibrated)


def test_generated_weights_are_the_same_each_time(small_config):
    one, two = (
        latency.calibrated_network(small_config).architecture.state_dict()
        for _ in range(2)
    )
    assert all(np.array_equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize('name', ['batch', 'threads', 'rounds'])
def test_arguments(fails, name):
    line = fails(latency_command, CONFIG, f'--{name}', 0, *OPTIONS)
    assert f"--{name}: expected an integer from 1, got '0'" in line


def test_a_float_network_is_refused(fails, root):
    line = fails(latency_command, root / 'configs/float_r20_digits.py')
    assert "model.type: expected 'mmauxq.JointQAT'" in line
