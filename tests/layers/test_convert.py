"""A whole network, there and back."""

import copy
import io

import pytest
import torch
from torch import nn

from mmauxq.errors import UsageError
from mmauxq.layers import (
    LayerBits,
    QuantLayer,
    build_quantizer,
    convert,
    is_quantizable,
    restore,
)
from mmauxq.quantizers import (
    LSQ,
    DoReFaActivation,
    DoReFaWeight,
    LSQPlus,
    PACTActivation,
    calibrate,
)

CFG = dict(type='mmauxq.LSQ', bits=4)


class Network(nn.Module):
    """With one layer that runs twice, from two places."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.again = self.body[0]
        self.absent = None
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.again(self.body(self.norm(self.stem(x))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def x():
    return torch.randn(2, 3, 6, 6)


@pytest.fixture
def network():
    return Network().eval()


def quantize(network, names=('stem', 'body.0', 'fc'), bits=(2, 2)):
    return convert(
        network, {name: LayerBits(*bits, '') for name in names}, CFG, CFG
    )


def calibrated(network, x):
    calibrate(network, lambda: network(x))
    return network


def quantized_names(network):
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, QuantLayer)
    ]


def test_the_model_itself_is_changed(network):
    assert quantize(network) is network


def test_only_named_layers_are_converted(network):
    assert quantized_names(quantize(network, ['body.0'])) == ['body.0']


def test_layers_of_32_bits_stay_as_they_are(network):
    fc = network.fc
    assert quantize(network, ['fc'], (32, 32)).fc is fc


def test_one_operand_may_stay_float(network, x):
    quantize(network, ['fc'], (2, 32))
    assert network.fc.weight_quantizer.bits == 2
    assert isinstance(network.fc.input_quantizer, nn.Identity)


def test_a_shared_layer_stays_shared(network):
    quantize(network)
    assert network.again is network.body[0]
    assert isinstance(network.again, QuantLayer)


def test_a_shared_layer_is_found_by_its_second_name(network):
    quantize(network, ['again'])
    assert network.again is network.body[0]
    assert isinstance(network.again, QuantLayer)


def test_a_restored_shared_layer_stays_shared(network):
    restore(quantize(network))
    assert network.again is network.body[0]


def test_parameter_names_and_objects_are_unchanged(network):
    before = dict(network.named_parameters())
    quantize(network)
    after = {
        name: parameter
        for name, parameter in network.named_parameters()
        if '_quantizer.' not in name
    }
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_a_float_checkpoint_misses_the_quantizers_only(network):
    state = copy.deepcopy(network.state_dict())
    keys = quantize(network).load_state_dict(state, strict=False)
    assert keys.unexpected_keys == []
    assert keys.missing_keys
    assert all('_quantizer.' in key for key in keys.missing_keys)


def test_quantization_changes_the_output(network, x):
    before = network(x)
    assert not torch.equal(calibrated(quantize(network), x)(x), before)


def test_restore_gives_the_float_output_back(network, x):
    before = network(x)
    restore(calibrated(quantize(network), x))
    assert torch.equal(network(x), before)


def test_restore_gives_the_float_state_back(network, x):
    before = list(network.state_dict())
    restore(calibrated(quantize(network), x))
    assert list(network.state_dict()) == before
    assert quantized_names(network) == []


def test_restore_leaves_a_float_network_alone(network):
    before = list(network.modules())
    assert list(restore(network).modules()) == before


def test_a_bare_layer_goes_there_and_back():
    layer = nn.Linear(3, 2)
    there = quantize(layer, [''])
    assert isinstance(there, QuantLayer)
    assert type(restore(there)) is nn.Linear


def test_a_copied_network_computes_the_same(network, x):
    calibrated(quantize(network), x)
    assert torch.equal(copy.deepcopy(network)(x), network(x))


def test_a_saved_state_computes_the_same(network, x):
    fresh = quantize(copy.deepcopy(network))
    calibrated(quantize(network), x)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(x), network(x))


@pytest.mark.parametrize(
    'module, expected',
    [
        (nn.Conv1d(1, 1, 1), True),
        (nn.Conv2d(1, 1, 1), True),
        (nn.Conv3d(1, 1, 1), True),
        (nn.Linear(1, 1), True),
        (nn.ConvTranspose2d(1, 1, 1), False),
        (nn.BatchNorm2d(1), False),
        (nn.Embedding(1, 1), False),
    ],
)
def test_what_can_be_quantized(module, expected):
    assert is_quantizable(module) is expected


@pytest.mark.parametrize(
    'name, role, cls',
    [
        ('mmauxq.LSQ', 'weight', LSQ),
        ('mmauxq.LSQ', 'activation', LSQ),
        ('mmauxq.LSQPlus', 'weight', LSQPlus),
        ('mmauxq.LSQPlus', 'activation', LSQPlus),
        ('mmauxq.PACTActivation', 'activation', PACTActivation),
        ('mmauxq.DoReFaActivation', 'activation', DoReFaActivation),
        ('mmauxq.DoReFaWeight', 'weight', DoReFaWeight),
    ],
)
def test_registered_names(name, role, cls):
    quantizer = build_quantizer(dict(type=name), role, nn.Linear(2, 3), 4)
    assert type(quantizer) is cls
    assert (quantizer.role, quantizer.bits) == (role, 4)


def test_the_bits_of_the_layer_replace_those_of_the_config():
    quantizer = build_quantizer(CFG, 'weight', nn.Linear(2, 3), 8)
    assert (quantizer.bits, CFG['bits']) == (8, 4)


def test_32_bits_need_no_quantizer():
    found = build_quantizer(CFG, 'weight', nn.Linear(2, 3), 32)
    assert isinstance(found, nn.Identity)


@pytest.mark.parametrize(
    'layer, role, channels, axis',
    [
        (nn.Conv2d(2, 3, 1), 'weight', 3, 0),
        (nn.Conv2d(2, 3, 1), 'activation', 2, 1),
        (nn.Linear(2, 3), 'weight', 3, 0),
        (nn.Linear(2, 3), 'activation', 2, -1),
    ],
)
def test_per_channel(layer, role, channels, axis):
    cfg = dict(CFG, per_channel=True)
    quantizer = build_quantizer(cfg, role, layer, 4)
    found = (quantizer.step.numel(), quantizer.channel_axis)
    assert found == (channels, axis)


@pytest.mark.parametrize(
    'layer, shape',
    [
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
        (nn.Linear(4, 6), (2, 30, 4)),
    ],
    ids=['grouped conv', 'linear'],
)
def test_per_channel_layers_run(layer, shape):
    x = torch.randn(shape)
    layer.reset_parameters()  # anew, after the seed
    cfg = dict(CFG, per_channel=True)
    bits = {'0': LayerBits(2, 2, '')}
    model = convert(nn.Sequential(layer), bits, cfg, cfg)
    calibrated(model, x)(x).sum().backward()
    steps = [model[0].weight_quantizer.step, model[0].input_quantizer.step]
    assert all(bool(step.grad.all()) for step in steps)


QUANTIZERS = (
    'expected mmauxq.LSQ, mmauxq.LSQPlus, mmauxq.PACTActivation, '
    'mmauxq.DoReFaActivation, mmauxq.DoReFaWeight or mmauxq.L1ScaledWeight, '
    'got '
)


@pytest.mark.parametrize(
    'cfg, role, message',
    [
        (
            dict(type='mmauxq.Nothing'),
            'weight',
            f"quantizers.weight.type: {QUANTIZERS}'mmauxq.Nothing'",
        ),
        (
            dict(type='mmauxq.CIFARResNet'),
            'activation',
            f"quantizers.activation.type: {QUANTIZERS}'mmauxq.CIFARResNet'",
        ),
        (
            {},
            'weight',
            f'quantizers.weight.type: {QUANTIZERS}None',
        ),
        (
            dict(type='mmauxq.DoReFaWeight', per_channel=True),
            'weight',
            'quantizers.weight: DoReFaWeight has no per-channel form; '
            'remove per_channel',
        ),
        (
            dict(type='mmauxq.DoReFaWeight', stepp=1),
            'weight',
            'quantizers.weight: expected arguments of DoReFaWeight, '
            "['bits', 'role'], got ['stepp']",
        ),
        (
            dict(type='mmauxq.PACTActivation'),
            'weight',
            "PACTActivation: expected a role out of ['activation'], got "
            "'weight'",
        ),
    ],
)
def test_bad_quantizer_configs(cfg, role, message):
    with pytest.raises(UsageError) as error:
        build_quantizer(cfg, role, nn.Linear(2, 3), 4)
    assert str(error.value) == message
