from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest

from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.deploy.network import calibrated_network
from mmauxq.deploy.onnx import latency
from mmauxq.errors import TrainingError, UsageError
from tests.commands import latency_command
from tests.deploy.conftest import CONFIG, OPTIONS


class FakeForm:
    """One that takes given times."""

    def __init__(self, name, seconds, calls):
        self.name, self.times, self.calls = name, iter(seconds), calls

    def seconds(self):
        self.calls.append(self.name)
        return next(self.times)


def test_forms_take_turns_and_each_round_begins_with_another():
    calls, rounds = [], []
    forms = dict(
        a=FakeForm('a', [4, 2, 6], calls),
        b=FakeForm('b', [2, 2, 2], calls),
        c=FakeForm('c', [4, 4, 4], calls),
    )
    found = latency.latencies(forms, 3, lambda: rounds.append(1))
    assert ''.join(calls) == 'abcbcacab' and len(rounds) == 3
    assert found['a'].seconds == (3, 4, 5)
    assert found['a'].speed_up == (1, 1, 1)
    # ratios of times of one round, not of medians
    assert found['b'].speed_up == (1.5, 2, 2.5)
    assert found['c'].speed_up == (0.75, 1, 1.25)


def test_a_form_has_a_process_of_its_own(small_config):
    network = calibrated_network(small_config)
    shape = network.algorithm.cost.shape
    model = latency.forms_of(network)['float'].SerializeToString()
    form = latency.TimedForm('onnxruntime', model, 1, (2, *shape))
    try:
        assert form.seconds() > 0 and form.process.poll() is None
    finally:
        form.close()
    assert form.process.returncode == 0
    # loaded without this package, so that no thread of torch is near
    code = Path(latency.timed_process.__file__).read_text()
    assert 'torch' not in code and 'import mmauxq' not in code
    with pytest.raises(UsageError, match='onnxruntime refuses the model'):
        latency.TimedForm('onnxruntime', model, 1, (2, *shape, 7))
    killed = latency.TimedForm('onnxruntime', model, 1, (2, *shape))
    killed.process.kill()
    with pytest.raises(TrainingError, match='ended with status -9'):
        killed.seconds()
    killed.close()


def test_typed_weights_are_unpacked_once(small_config, tmp_path):
    """As the model is loaded; the logits are those of the file as it is."""
    network = calibrated_network(small_config)
    shape = network.algorithm.cost.shape
    content = latency.forms_of(network)['typed'].SerializeToString()
    images = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    counts, logits = [], []
    for unpacked in (False, True):
        file = tmp_path / f'{unpacked}.onnx'
        running = latency.timed_process.onnxruntime_session(
            content, 1, str(file), unpacked
        )
        nodes = onnx.load(str(file)).graph.node
        kinds = [node.op_type for node in nodes]
        counts.append(kinds.count('DequantizeLinear'))
        (name,) = (value.name for value in running.get_inputs())
        logits.append(running.run(None, {name: images})[0])
    # what is left dequantizes activations
    assert counts[0] - counts[1] == 8
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-6)


def test_busy_cores(monkeypatch):
    """Threads that run or wait, but for the one that asks."""
    counts = iter([1, 3, 2, 2])
    monkeypatch.setattr(
        Path, 'read_text', lambda self: f'0.1 0.2 0.3 {next(counts)}/99 1'
    )
    assert latency.busy_cores(0.08) == 1.0


def test_the_table(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, 'busy_cores', lambda: 0.7)
    file = tmp_path / 'network.pth'
    args = [CONFIG, '--batch', 2, '--threads', 1, '--rounds', 1,
            '--save', file, *OPTIONS]  # fmt: skip
    assert latency_command([str(a) for a in args]) == 0
    printed = capfd.readouterr()
    assert (
        'kept 0.7 cores busy, so that these figures are no ev' in printed.err
    )
    assert '(C, H, W) = (1, 8, 8); 1 rounds' in printed.out
    assert f'cores; onnxruntime {version("onnxruntime")}; im' in printed.out
    rows = [
        [cell.strip() for cell in line.split('|')[1:-1]]
        for line in printed.out.splitlines()
        if line.startswith('| onnxruntime')
    ]
    assert [(r[3], int(r[4])) for r in rows] == [
        ('float', 0), ('typed', 0), ('int8', 3), ('int8, residual int8', 8),
        ('typed, unpacked', 0),
    ]  # fmt: skip
    assert rows[0][6] == '1.00 (1.00-1.00)'
    assert all(float(r[5].split()[0]) > 0 for r in rows)
    assert {float(r[7]) for r in rows if r[7]} == {0.7}
    state = read_checkpoint(file)['state_dict']
    calibrated = [v for k, v in state.items() if k.endswith('calibrated')]
    assert len(calibrated) == 16 and all(calibrated)


def test_generated_weights_are_the_same_each_time(small_config):
    one, two = (
        calibrated_network(small_config).architecture.state_dict()
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
