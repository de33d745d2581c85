import errno
import os

import pytest
import torch

from mmauxq.deploy import slim_checkpoint
from mmauxq.errors import TrainingError, UsageError
from tests.networks import QUANTIZERS, batch, joint_qat


@pytest.fixture
def trained(tmp_path):
    model = joint_qat()
    model.loss(*batch())
    file = tmp_path / 'epoch_1.pth'
    torch.save(
        dict(
            meta=dict(epoch=1, iter=3, cfg='a = 1'),
            state_dict=model.state_dict(),
            optimizer=torch.optim.Adam(model.parameters()).state_dict(),
        ),
        file,
    )
    return model.eval(), file


def test_it_holds_the_network_alone(trained, tmp_path):
    model, file = trained
    slim = tmp_path / 'slim.pth'
    size = slim_checkpoint(file, slim)
    assert size == slim.stat().st_size < file.stat().st_size
    content = torch.load(slim, weights_only=True)
    assert (
        content['state_dict'].keys() == model.architecture.state_dict().keys()
    )
    assert content['meta']['epoch'] == 1
    assert set(content) == {'meta', 'state_dict'}


def test_its_logits_are_those_of_the_training_network(trained, tmp_path):
    model, file = trained
    slim_checkpoint(file, tmp_path / 'slim.pth')
    shipped = joint_qat(seed=7, guidance=None).eval()
    content = torch.load(tmp_path / 'slim.pth', weights_only=True)
    shipped.load_state_dict(content['state_dict'])
    inputs, _ = batch(seed=4)
    assert torch.equal(
        shipped(inputs, mode='tensor'), model(inputs, mode='tensor')
    )


def test_nothing_is_left_half_written(trained, tmp_path, monkeypatch):
    _, file = trained
    slim = tmp_path / 'slim.pth'
    slim.write_bytes(b'the old one')

    def full(handle):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(TrainingError, match='No space left on device'):
        slim_checkpoint(file, slim)
    assert [f.name for f in tmp_path.iterdir() if f.name != file.name] == [
        'slim.pth'
    ]
    assert slim.read_bytes() == b'the old one'


def test_of_32_bits_it_is_the_float_network(tmp_path):
    """The first stage of the method: floating point, with the module."""
    floats = {k: dict(v, bits=32) for k, v in QUANTIZERS.items()}
    model = joint_qat(quantizers=floats)
    file = tmp_path / 'epoch_1.pth'
    torch.save(dict(state_dict=model.state_dict()), file)
    slim_checkpoint(file, tmp_path / 'slim.pth')
    state = torch.load(tmp_path / 'slim.pth', weights_only=True)['state_dict']
    expected = model.architecture.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_float_checkpoint_is_refused(tmp_path):
    file = tmp_path / 'float.pth'
    torch.save(dict(state_dict=dict(w=torch.zeros(1))), file)
    with pytest.raises(UsageError, match='expected a quantized network'):
        slim_checkpoint(file, tmp_path / 'slim.pth')
    assert not (tmp_path / 'slim.pth').exists()
