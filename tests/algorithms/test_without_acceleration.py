"""What only makes a step faster changes no number, and stands apart."""

import sys

import pytest
import torch

from mmauxq.quantizers import functional
from tests.networks import AUX, batch, joint_qat

PROGRAM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith('mmauxq.accelerate'):
            raise ImportError(f'{name} is blocked')

if sys.argv[1] == 'blocked':
    sys.meta_path.insert(0, Blocked())

import torch
from mmauxq.quantizers import functional
from tests.networks import AUX, batch, joint_qat

numbers = []
for guidance in (None, AUX, dict(type='mmauxq.KnowledgeDistillation')):
    more = {} if sys.argv[1] == 'blocked' else dict(speed={})
    model = joint_qat(guidance=guidance, **more)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for seed in range(4):
        losses = model.loss(*batch(seed=seed))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        numbers += [value.item().hex() for value in losses.values()]
    numbers += [v.double().sum().item().hex() for v in
                model.state_dict().values()]
assert ('mmauxq.accelerate' in sys.modules) == (sys.argv[1] != 'blocked')
print(*numbers)
"""


def test_without_the_folder_every_number_is_the_same(run_python, tmp_path):
    (tmp_path / 'program.py').write_text(PROGRAM)
    results = []
    for how in ('blocked', 'there'):
        done = run_python('program.py', how, env=dict(CUDA_VISIBLE_DEVICES=''))
        assert done.returncode == 0, done.stderr
        results.append(done.stdout.splitlines()[-1].split())
    assert len(results[0]) > 100
    assert results[0] == results[1]


def holds_tensors(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(holds_tensors, value))
    return isinstance(value, torch.Tensor)


def calls_of_a_step(guidance):
    """(file, function) of ours that data passes in a step, each once."""
    model = joint_qat(guidance=guidance, speed='eager')
    inputs, samples = batch()
    model.loss(inputs, samples)
    seen = {}

    def note(frame, event, argument):
        code = frame.f_code
        file = code.co_filename.rpartition('/mmauxq/')[2]
        if event == 'call' and file != code.co_filename:
            given = code.co_varnames[: code.co_argcount]
            data = any(holds_tensors(frame.f_locals[n]) for n in given)
            if data and not file.startswith('backbones'):
                seen[file, code.co_name] = None

    sys.setprofile(note)
    try:
        model.loss(inputs, samples)
    finally:
        sys.setprofile(None)
    return list(seen)


@pytest.mark.parametrize('guidance, most', [(None, 6), (AUX, 9)])
def test_a_reader_follows_a_step_through_few_files(
    guidance, most, monkeypatch
):
    monkeypatch.setattr(functional, '_backend', None)  # of another test
    calls = calls_of_a_step(guidance)
    files = {file for file, _ in calls}
    assert len(files) <= most, files
    public = [name for _, name in calls if not name.startswith(('_', '<'))]
    assert len(public) <= 22, public


def test_the_eager_step_is_the_plain_one():
    assert joint_qat(speed='eager').step is None
    torch.manual_seed(0)
    plain, fast = joint_qat(), joint_qat(speed={})
    found, expected = (m.loss(*batch()) for m in (fast, plain))
    assert all(torch.equal(found[n], v) for n, v in expected.items())
