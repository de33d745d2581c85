import json

import pytest
import torch
from safetensors import safe_open

from mmauxq.errors import UsageError
from mmauxq.evaluation import deployed_bytes
from mmauxq.export import load_packed, save_packed
from tests.networks import batch, classifier, joint_qat


def trained(weight='LSQ', bits=2, **settings):
    quantizers = dict(
        weight=dict(type=f'mmauxq.{weight}', bits=bits),
        activation=dict(type='mmauxq.LSQ', bits=bits),
    )
    model = joint_qat(guidance=None, quantizers=quantizers, **settings)
    model.loss(*batch())
    return model.eval().architecture


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('weight', ['LSQ', 'LSQPlus', 'DoReFaWeight'])
def test_it_loads_back_to_the_bit(tmp_path, weight, bits):
    network = trained(weight, bits)
    file = tmp_path / 'packed.safetensors'
    assert save_packed(network, file, IMAGE) == file.stat().st_size
    again = trained(weight, bits, seed=5)
    load_packed(file, again)
    inputs = batch(seed=3)[0]
    assert torch.equal(
        again(inputs, mode='tensor'), network(inputs, mode='tensor')
    )


def test_its_size_is_the_sum_of_bits(tmp_path):
    network = trained(architecture=classifier(base_channels=128))
    size = save_packed(network, tmp_path / 'p.safetensors')
    assert 1 <= size / deployed_bytes(network) < 1.03


def test_the_layout_is_in_the_metadata(tmp_path):
    network = trained()
    save_packed(network, tmp_path / 'p', dict(mean='[0]'))
    with safe_open(tmp_path / 'p', 'pt') as content:
        metadata = content.metadata()
        layout = json.loads(metadata['weights'])
        name = 'backbone.layer1.0.conv1.weight'
        assert content.get_tensor(f'{name}.codes').numel() == 4 * 4 * 9 // 4
    assert layout[name] == dict(
        bits=2, shape=[4, 4, 3, 3], lowest=-2, stride=1
    )
    assert metadata['mean'] == '[0]'


def test_another_network_is_refused(tmp_path):
    save_packed(trained(), tmp_path / 'p')
    with pytest.raises(UsageError, match='2 bits and shape .* 3 bits'):
        load_packed(tmp_path / 'p', trained(bits=3))


def test_one_bit_dorefa_is_refused(tmp_path):
    with pytest.raises(UsageError, match='no integer form at 1 bits'):
        save_packed(_one_bit(), tmp_path / 'p')


def _one_bit():
    quantizers = dict(
        weight=dict(type='mmauxq.DoReFaWeight', bits=1),
        activation=dict(type='mmauxq.LSQ', bits=2),
    )
    model = joint_qat(guidance=None, quantizers=quantizers)
    model.loss(*batch())
    return model.eval().architecture
