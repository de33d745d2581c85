import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mmauxq import compat
from mmauxq.analysis import deployed_bytes, quantized_weights
from mmauxq.deploy import fill_packed, write_packed
from mmauxq.deploy.network import calibrated_network
from mmauxq.deploy.packed import FORMAT, pack, read_packed, unpack
from mmauxq.errors import UsageError
from mmauxq.layers import quant_class
from mmauxq.quantizers import LSQ, calibrate, named_quantizers
from tests.conftest import ROOT
from tests.networks import batch, joint_qat

IMAGE = batch(1)[0]


@given(st.integers(1, 8), st.data())
def test_codes_come_back(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    packed = pack(np.array(codes, int), bits)
    assert len(packed) == -(-len(codes) * bits // 8)
    assert unpack(packed, bits, len(codes)).tolist() == codes


def test_lowest_bit_first():
    assert pack(np.array([1, 2, 3, 0]), 2).tolist() == [0b00111001]
    assert pack(np.array([5, 3, 7]), 3).tolist() == [0b11011101, 0b1]


@pytest.mark.parametrize('codes', [[4], [-1]])
def test_a_code_that_does_not_fit(codes):
    with pytest.raises(UsageError, match='expected codes from 0 to 3, got'):
        pack(np.array(codes), 2)


def test_a_cut_row():
    with pytest.raises(UsageError, match='2 bits: expected 3 bytes, got 1'):
        unpack(np.zeros(1, np.uint8), 2, 9)


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
    assert write_packed(network, file, IMAGE) == file.stat().st_size
    again = trained(weight, bits, seed=5)
    fill_packed(file, again)
    inputs = batch(seed=3)[0]
    assert torch.equal(
        again(inputs, mode='tensor'), network(inputs, mode='tensor')
    )


def test_equal_networks_give_equal_files(tmp_path, run_python):
    network = trained()
    write_packed(network, tmp_path / 'p', IMAGE, dict(mean=[0], std=[1]))
    torch.save(network, tmp_path / 'network')
    done = run_python(
        '-c',
        'import torch\nfrom mmauxq.deploy import write_packed\n'
        "network = torch.load('network', weights_only=False)\n"
        "write_packed(network, 'q', torch.zeros(1, 1, 8, 8), "
        'dict(mean=[0], std=[1]))\n',
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'p').read_bytes() == (tmp_path / 'q').read_bytes()


def test_its_size_is_the_sum_of_bits_and_of_names(tmp_path):
    """Of the smallest network: 25 kB of numbers, and as much for names."""
    compat.enable()
    from mmengine.config import Config

    cfg = Config.fromfile(ROOT / 'configs/aux_r20_w2a2_digits.py')
    network = calibrated_network(cfg).architecture
    meta = dict(mean=[77.84], std=[95.89], channel_order='as read')
    meta['classes'] = list('0123456789')
    size = write_packed(network, tmp_path / 'p', IMAGE, meta)
    names = size - deployed_bytes(network)
    assert 0 < names < 160 * len(network.state_dict())


def test_codes_can_be_read_without_the_network(tmp_path):
    network = trained()
    write_packed(network, tmp_path / 'p', IMAGE, dict(mean=[0]))
    state, codes, meta = read_packed(tmp_path / 'p')
    name = 'backbone.layer1.0.conv1.weight'
    code, bits = codes[name]
    layer = network.backbone.layer1[0].conv1
    assert bits == 2
    assert torch.equal(code, layer.weight_quantizer.codes(layer.weight))
    assert meta == dict(mean=[0])
    whole = network.state_dict()
    assert state.keys() | codes.keys() == whole.keys()
    assert all(torch.equal(state[key], whole[key]) for key in state)
    with safe_open(tmp_path / 'p', 'pt') as content:
        assert set(content.keys()) == set(whole)


def test_another_network_is_refused(tmp_path):
    write_packed(trained(), tmp_path / 'p', IMAGE)
    with pytest.raises(
        UsageError, match=r'shape \(3, -4, 1, .* got \(2, -2, 1, '
    ):
        fill_packed(tmp_path / 'p', trained(bits=3))
    with pytest.raises(UsageError, match='differs in backbone.layer1.0.conv1'):
        fill_packed(
            tmp_path / 'p',
            trained(policy=dict(layers={'backbone.layer1.0.conv1': 32})),
        )


@pytest.mark.parametrize('content', [b'', b'no network', None])
def test_another_file_is_refused(tmp_path, content):
    file = tmp_path / 'p'
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match='p: cannot be read'):
        fill_packed(file, trained())


def test_one_bit_dorefa_is_refused(tmp_path):
    quantizers = dict(
        weight=dict(type='mmauxq.DoReFaWeight', bits=1),
        activation=dict(type='mmauxq.LSQ', bits=2),
    )
    model = joint_qat(guidance=None, quantizers=quantizers)
    model.loss(*batch())
    with pytest.raises(UsageError, match='no integer form at 1 bits'):
        write_packed(model.eval().architecture, tmp_path / 'p', IMAGE)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Padded(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(
            nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias
        )


class Takes(nn.Module):
    """A classifier as far as packing is concerned."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, mode='tensor'):
        x = self.layer(x)
        return x[0] if isinstance(x, tuple) else x


def calibrated(layer, x):
    cls = quant_class(type(layer))
    layer = cls.from_float(layer, LSQ(2, 'weight'), LSQ(2))
    calibrate(layer, lambda: Takes(layer)(x))
    return Takes(layer).eval()


def test_a_weight_that_is_computed_is_refused(tmp_path):
    network = calibrated(Standardised(1, 4, 3), IMAGE)
    with pytest.raises(UsageError, match='layer.weight: what is quantized'):
        write_packed(network, tmp_path / 'p', IMAGE)
    assert not (tmp_path / 'p').exists()


def test_a_weight_of_a_layer_with_its_own_forward(tmp_path):
    torch.manual_seed(0)
    network = calibrated(Padded(1, 4, 3), IMAGE)
    write_packed(network, tmp_path / 'p', IMAGE)
    expected = network(IMAGE)
    nn.init.zeros_(network.layer.weight)
    fill_packed(tmp_path / 'p', network)
    assert torch.equal(network(IMAGE), expected)


def test_projections_of_attention(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    attention = quant_class(nn.MultiheadAttention).from_float(
        nn.MultiheadAttention(8, 2), LSQ(2, 'weight'), LSQ(2)
    )

    class Attends(Takes):
        def forward(self, x, mode='tensor'):
            return self.layer(x, x, x, need_weights=False)[0]

    network = Attends(attention).eval()
    calibrate(network, lambda: network(x))
    expected = network(x).detach()
    assert set(quantized_weights(network)) == {'layer.in_proj_weight'}
    write_packed(network, tmp_path / 'p', x)
    nn.init.zeros_(attention.in_proj_weight)
    fill_packed(tmp_path / 'p', network)
    assert torch.equal(network(x), expected)


def rewritten(file, tensors=None, **metadata):
    """The file with other tensors (name -> function) and metadata."""
    with safe_open(file, 'pt') as content:
        kept = content.metadata()
        whole = {name: content.get_tensor(name) for name in content.keys()}
    for name, change in (tensors or {}).items():
        whole[name] = change(whole.get(name))
    whole = {
        name: tensor for name, tensor in whole.items() if tensor is not None
    }
    if 'text' in metadata:
        kept['mmauxq'] = metadata['text'](kept['mmauxq'])
    about = json.loads(kept['mmauxq']) if metadata.keys() - {'text'} else {}
    for key, change in metadata.items() if about else ():
        about[key] = change(about[key])
        kept['mmauxq'] = json.dumps(about)
    save_file(whole, file, kept)


WEIGHT = 'backbone.layer1.0.conv1.weight'
STEP = 'backbone.layer1.0.conv1.weight_quantizer.step'


def layout(**entries):
    """A change of the layout; ``None`` leaves the entry out."""

    def change(content):
        for key, value in entries.items():
            content[WEIGHT if key == 'weight' else key] = value
        return {k: v for k, v in content.items() if v is not None}

    return dict(layout=change)


@pytest.mark.parametrize(
    'changes, message',
    [
        (layout(weight=[2, -2, 1]), 'its bits, lowest code, stride and shape'),
        (layout(weight=[99, -2, 1, [4, 4, 3, 3]]), 'its bits, lowest code'),
        (layout(weight=[2, -2, 1, [4, 4, 3, -3]]), 'its bits, lowest code'),
        (layout(weight=[2, -2, 1, [2**40]]), 'its bits, lowest code'),
        (layout(weight=[2.0, -2, 1, [4, 4, 3, 3]]), 'its bits, lowest code'),
        (layout(weight=[2, -2, 1, [4, 4, 3, 4]]), 'expected 48 bytes for 192'),
        (layout(weight=[2, -1, 1, [4, 4, 3, 3]]), 'got .2, -1, 1, '),
        (layout(weight=[2, -2, 1, [4, 4, 9]]), 'got .2, -2, 1, .4, 4, 9'),
        (layout(weight=None), 'which differs in backbone.layer1.0.conv1'),
        (layout(other=[2, -2, 1, [4]]), 'other: expected a tensor, and its'),
        (dict(layout=lambda _: []), 'expected a layout and meta'),
        (dict(text=lambda _: '{'), 'expected JSON'),
        (dict(text=lambda _: '[' * 10**5), 'expected JSON'),
        (dict(text=lambda _: '[1]'), 'export the network again'),
        (dict(meta=lambda _: 3), 'expected a layout and meta'),
        (dict(format=lambda _: 'mmauxq-packed-2'), 'export the network again'),
        (
            dict(tensors={WEIGHT: lambda t: t[:-1]}),
            'expected 36 bytes for 144',
        ),
        (dict(tensors={WEIGHT: lambda t: t.float()}), 'got torch.float32'),
        (dict(tensors={WEIGHT: lambda t: None}), 'expected a tensor, and its'),
        (dict(tensors={STEP: lambda t: -t}), 'expected steps above 0'),
        (
            dict(tensors={STEP: lambda t: t * 0}),
            'expected steps above 0, got 0',
        ),
        (dict(tensors={STEP: lambda t: t / 0}), 'expected finite numbers'),
        (dict(tensors={STEP: lambda t: t[None]}), 'expected .torch.float32, '),
        (dict(tensors={STEP: lambda t: t.double()}), 'got .torch.float64, '),
        (dict(tensors={'head.fc.bias': lambda t: t * float('nan')}), 'finite'),
        (
            dict(tensors={'backbone.bn1.running_var': lambda t: -t}),
            'variances',
        ),
        (dict(tensors={'a.b': lambda t: torch.zeros(1)}), 'differs in a.b'),
        (
            dict(tensors={'head.fc.bias': lambda t: None}),
            'differs in head.fc.',
        ),
    ],
)
def test_every_field_is_checked(tmp_path, changes, message):
    file = tmp_path / 'p'
    write_packed(trained(), file, IMAGE)
    rewritten(file, **changes)
    network = trained(seed=5)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(UsageError, match=message) as error:
        fill_packed(file, network)
    assert str(error.value).startswith(f'{file}: ')
    after = network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_bits_behind_the_last_code(tmp_path):
    file = tmp_path / 'p'
    about = dict(format=FORMAT, layout=dict(w=[3, -4, 1, [5]]), meta={})
    odd = torch.full((2,), 255, dtype=torch.uint8)
    save_file(
        {'w': odd},
        file,
        dict(mmauxq=json.dumps(about)),
    )
    with pytest.raises(UsageError, match='w: expected zeros after the last'):
        read_packed(file)


@pytest.mark.parametrize('kind', ['LSQ', 'LSQPlus', 'DoReFaWeight'])
@pytest.mark.parametrize('bits', [2, 3, 8])
def test_no_code_is_outside_of_the_grid(kind, bits):
    """So that bits, lowest code and stride are all that is compared."""
    for _, quantizer in named_quantizers(trained(kind, bits)):
        grid = quantizer.grid()
        assert grid.qmin + grid.stride * (2**quantizer.bits - 1) == grid.qmax
