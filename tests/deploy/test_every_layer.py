import torch

from mmauxq.deploy.every_layer import load_every_layer
from mmauxq.layers import QuantLayer
from mmauxq.quantizers import named_quantizers
from tests.networks import captured


def test_a_trained_network_is_as_it_was(small_config, checkpoint, network):
    """Also with a first layer and a classifier that could be quantized."""
    with captured() as messages:
        every = load_every_layer(small_config, checkpoint)
    assert [m for m in messages if 'W2A2' in m]
    assert not [m for m in messages if 'W8A8' in m]  # no layer has them
    before, after = network.architecture, every.architecture
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        expected = before(images, mode='tensor')
        assert torch.equal(after(images, mode='tensor'), expected)
    names = [name for name, _ in named_quantizers(before)]
    assert [name for name, _ in named_quantizers(after)] == names
    for name in ('backbone.conv1', 'head.fc'):
        assert not isinstance(before.get_submodule(name), QuantLayer)
        assert isinstance(after.get_submodule(name), QuantLayer)


def test_a_float_network_has_no_quantizer(small_config, network, tmp_path):
    state = {
        key: value
        for key, value in network.architecture.state_dict().items()
        if 'quantizer' not in key
    }
    torch.save(state, tmp_path / 'float.pth')
    every = load_every_layer(small_config, str(tmp_path / 'float.pth'))
    assert not list(named_quantizers(every.architecture))
    layers = [
        name
        for name, module in every.architecture.named_modules()
        if isinstance(module, QuantLayer)
    ]
    assert sorted(layers) == sorted(every.algorithm.bits)
