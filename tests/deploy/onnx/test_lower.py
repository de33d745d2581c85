"""Layers of every kind through PyTorch's exporter and ONNX Runtime."""

import pytest
import torch
from onnx import numpy_helper
from torch import nn

from mmauxq.deploy.onnx import runtime
from mmauxq.deploy.onnx.onnx_model import to_onnx
from mmauxq.deploy.onnx.trace import trace
from mmauxq.deploy.onnx.verify import compare, differing_weights
from mmauxq.errors import UsageError
from mmauxq.layers import quant_class
from mmauxq.quantizers import LSQ, LSQPlus, calibrate

SHAPE = (4, 6, 6)


class Net(nn.Module):
    """Called as a classifier; averages over space."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x, mode='tensor'):
        return self.layers(x).flatten(2).mean(2)


class Linear(nn.Module):
    """Two linear layers, of which the second has no bias."""

    def __init__(self, activation, bits):
        super().__init__()
        layers = nn.Linear(144, 32), nn.Linear(32, 10, bias=False)
        self.layers = nn.Sequential(
            *(
                quant_class(nn.Linear).from_float(
                    layer, LSQ(bits, 'weight'), activation()
                )
                for layer in layers
            )
        )

    def forward(self, x, mode='tensor'):
        return self.layers(x.flatten(1))


def quantized(layer, bits=2, activation=LSQ, **settings):
    return quant_class(type(layer)).from_float(
        layer, LSQ(bits, 'weight', **settings), activation(bits)
    )


def images(count=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *SHAPE, generator=generator)


def prepared(*layers):
    """Calibrated, with batch norms as after training."""
    torch.manual_seed(0)
    network = Net(*layers).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    calibrate(network, lambda: network(images()))
    return network


def run(model, images):
    session = runtime.session(model)
    return session.run(['logits'], {'images': images.numpy()})[0]


def exported(network, graph, weights):
    """The model and its kernels, after every code was compared."""
    lowered = to_onnx(network, images(), weights, traced=graph)
    labels = torch.full((16,), -1)
    result = compare(network, lowered.model, [(images(), labels)], lowered)
    assert result.holds and result.codes > 0 and result.ties < 10
    assert differing_weights(network, lowered, images()) == []
    return lowered, runtime.operators(lowered.model)[1]


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def convolutions(bits=2, activation=LSQ):
    """One of each kind, with batch norms and ReLUs between them."""
    torch.manual_seed(0)
    layers = []
    for layer in (
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(8, 16, 3, groups=8, padding=2, dilation=2),
        Standardised(16, 8, 3, padding=1),
    ):
        nn.init.normal_(layer.weight, std=0.3)
        layers += [quantized(layer, bits), nn.BatchNorm2d(layer.out_channels)]
        layers += [nn.ReLU()]
    return prepared(*layers, quantized(nn.Conv2d(8, 8, 1), bits, activation))


@pytest.fixture(scope='module')
def chain():
    """Its trace, which is the same for all quantizers."""
    return trace(convolutions(), SHAPE)


@pytest.mark.parametrize('weights', ['typed', 'int8'])
@pytest.mark.parametrize('bits', [2, 4])
def test_convolutions(chain, bits, weights):
    network = convolutions(bits)
    lowered, kernels = exported(network, chain, weights)
    if weights == 'typed':
        assert kernels == {} and len(lowered.codes) == 5
        return
    names = ['layers.0', 'layers.3', 'layers.6', 'layers.9']
    assert kernels == dict.fromkeys(names, 'QLinearConv')
    assert lowered.exact_channels == 8 + 8 + 16 + 8 and not lowered.rounded
    assert lowered.float_layers == {
        'layers.12': 'its result goes on in float, to Reshape'
    }


class Tokens(nn.Module):
    """(N, C, H, W) to (N, tokens, C), a layer, and back."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        if isinstance(self.layer, nn.MultiheadAttention):
            x = self.layer(x, x, x, need_weights=False)[0]
        else:
            x = self.layer(x)
        return x.transpose(1, 2)


def tokens(per_channel, bits=4):
    torch.manual_seed(0)
    channels = dict(num_channels=8) if per_channel else {}
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention = quantized(attention, bits)
    attention.out_proj = quantized(attention.out_proj, bits)
    return prepared(
        Tokens(quantized(nn.Linear(4, 8), bits, **channels)), Tokens(attention)
    )


@pytest.fixture(scope='module')
def tokens_graph():
    return trace(tokens(False), SHAPE)


@pytest.mark.parametrize('weights', ['typed', 'int8'])
@pytest.mark.parametrize('per_channel', [False, True])
def test_linear_layers_and_attention(tokens_graph, weights, per_channel):
    network = tokens(per_channel)
    lowered, kernels = exported(network, tokens_graph, weights)
    kind = 'int4' if weights == 'typed' else 'int8'
    assert list(lowered.containers.values()) == [kind] * 3
    names = ['layers.0.layer', 'layers.1.layer', 'layers.1.layer.out_proj']
    assert kernels == (
        dict.fromkeys(names, 'MatMulIntegerToFloat')
        if weights == 'int8'
        else {}
    )


@pytest.mark.parametrize('weights', ['typed', 'int8'])
@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize(
    'activation',
    [
        lambda: LSQPlus(8),
        lambda: LSQ(16),
        lambda: LSQ(32),
    ],
    ids=['offset', '16 bits', 'float'],
)
def test_a_linear_layer_is_not_given_rounded_inputs(activation, bits, weights):
    """ONNX Runtime's MatMulNBits would round them by default."""
    torch.manual_seed(0)
    network = Linear(activation, bits).eval()
    calibrate(network, lambda: network(images()))
    lowered = to_onnx(network, images(), weights)
    result = compare(
        network, lowered.model, [(images(), torch.full((16,), -1))], lowered
    )
    assert result.holds, result
    assert 'MatMulNBits' not in runtime.operators(lowered.model)[0]


@pytest.mark.parametrize('weights', ['typed', 'int8'])
def test_an_offset_is_kept_and_named(chain, weights):
    network = convolutions(3, LSQPlus)
    nn.init.constant_(network.layers[-1].input_quantizer.offset, 0.07)
    lowered, kernels = exported(network, chain, weights)
    assert 'layers.12' not in kernels
    if weights == 'int8':
        assert lowered.float_layers == {
            'layers.9': 'its result goes on in float, to Relu',
            'layers.12': 'its input has an offset (LSQPlus)',
        }


def test_a_scale_for_each_channel_of_the_input_is_named(chain):
    network = convolutions(4)
    layer = network.layers[3]
    layer.input_quantizer = LSQ(4, num_channels=8, channel_axis=1)
    calibrate(network, lambda: network(images()))
    lowered, kernels = exported(network, chain, 'int8')
    assert 'layers.0' not in kernels and 'layers.3' not in kernels
    assert lowered.float_layers['layers.3'] == (
        'its input has a scale for each channel'
    )


def test_a_batch_norm_that_would_need_a_wider_type_stays(chain):
    network = convolutions(2)
    nn.init.constant_(network.layers[1].weight, -1.0)
    graph = trace(network, SHAPE)
    lowered, _ = exported(network, graph, 'typed')
    reasons = [x for x in lowered.kept.values() if x.startswith('layers.0.')]
    assert len(reasons) == 1 and 'turns code -2 into 2' in reasons[0]
    lowered, _ = exported(network, graph, 'int8')  # which is wide enough
    assert len(lowered.folded) == 4 and not lowered.kept


def test_nested_clips_become_the_limits_that_they_have_together():
    """A value from 2 to 6, then clipped to 0 to 1, is always 1."""
    network = prepared(
        quantized(nn.Conv2d(4, 4, 1), 4),
        nn.Hardtanh(2, 6),
        nn.Hardtanh(0, 1),
        quantized(nn.Conv2d(4, 4, 1), 4),
    )
    lowered, kernels = exported(network, trace(network, SHAPE), 'int8')
    assert 'layers.0' in kernels
    kinds = {node.op_type for node in lowered.model.graph.node}
    assert 'Clip' in kinds and not kinds & {'Min', 'Max', 'Relu'}


def change_codes(lowered, name, change):
    """Replace the codes of a weight in the exported model."""
    for tensor in lowered.model.graph.initializer:
        if tensor.name == f'{name}.codes':
            codes = change(numpy_helper.to_array(tensor).copy())
            tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))


def test_a_lost_channel_is_found():
    network = convolutions(4)
    nn.init.zeros_(network.layers[1].weight[3])  # may be lost, unlike 0
    lowered, _ = exported(network, trace(network, SHAPE), 'int8')
    name = 'layers.0.weight_quantizer'

    def lose(codes):
        assert not codes[3].any() and codes[0].any()
        codes[0] = 0
        return codes

    change_codes(lowered, name, lose)
    assert differing_weights(network, lowered, images()) == [name]


def test_a_transposed_square_matrix_is_found():
    network = prepared(Tokens(quantized(nn.Linear(4, 4), 4)))
    lowered, _ = exported(network, trace(network, SHAPE), 'int8')
    name = 'layers.0.layer.weight_quantizer'
    change_codes(lowered, name, lambda codes: codes.T)
    assert differing_weights(network, lowered, images()) == [name]


def test_a_layer_that_runs_twice_is_refused():
    layer = quantized(nn.Conv2d(4, 4, 1))
    network = prepared(layer, layer)
    with pytest.raises(UsageError, match='got one that runs 2 times'):
        to_onnx(network, images())


def test_a_weight_that_enters_two_products_is_refused():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = quantized(nn.Conv2d(4, 4, 1))

        def forward(self, x):
            weight = self.layer.weight_quantizer(self.layer.weight)
            x = self.layer.input_quantizer(x)
            conv = nn.functional.conv2d
            return conv(x, weight) + conv(-x, weight)

    with pytest.raises(UsageError, match='got several operators'):
        to_onnx(prepared(Both()), images())


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize('bits, may', [(4, False), (8, True)])
def test_layers_that_may_saturate_are_named(tokens_graph, bits, may):
    """Two products of 8-bit codes need more than 16 bits."""

    def lowered_with_large_codes(network, graph=None):
        for module in network.modules():
            if isinstance(module, LSQ) and module.role == 'weight':
                module.step.data *= 0.1
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.data.abs_()  # -128 could not be turned
        return to_onnx(network, images(), 'int8', traced=graph)

    lowered = lowered_with_large_codes(convolutions(bits))
    names = ['layers.0', 'layers.3', 'layers.6', 'layers.9']
    assert lowered.saturating == (names if may else [])
    for name in names:
        codes = weight_codes(lowered, f'{name}.weight_quantizer')
        inputs = 2**bits - 1
        if name == 'layers.0':  # shifted by 128, as it is signed
            inputs = 128 + 2 ** (bits - 1) - 1
        assert (2 * inputs * abs(codes).max() > 2**15 - 1) == may
    lowered = lowered_with_large_codes(tokens(False, bits), tokens_graph)
    assert ('layers.0.layer' in lowered.saturating) == may


@pytest.mark.parametrize('pooling', [False, True])
def test_a_float_layer_stays_float_whatever_follows(pooling):
    """The runtime would round the bias of a convolution whose quantizer it
    can move in front of what lies between."""
    network = prepared(
        quantized(nn.Conv2d(4, 8, 3, padding=1), 4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2) if pooling else nn.Identity(),
        quantized(nn.Conv2d(8, 8, 1), 4)
        if pooling
        else Tokens(quantized(nn.Linear(8, 8), 4)),
    )
    lowered, kernels = exported(network, trace(network, SHAPE), 'int8')
    assert 'layers.0' in lowered.float_layers and 'layers.0' not in kernels


@pytest.mark.parametrize('weights', ['typed', 'int8'])
@pytest.mark.parametrize('tiny', ['weight', 'input', 'both'])
def test_dead_channels_and_tiny_steps(weights, tiny):
    """A channel of zeros whose scale is the least that there is, and layers
    in which every value is beyond the last code."""
    channels = dict(num_channels=8)
    layers = [
        quantized(nn.Conv2d(4, 8, 3, padding=1), 4, **channels),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        quantized(nn.Conv2d(8, 8, 3), 4, **channels),
        nn.ReLU(),
        quantized(nn.Conv2d(8, 8, 1), 4, **channels),
    ]
    for layer in layers[::3]:
        nn.init.zeros_(layer.weight[2])
    network = prepared(*layers)
    epsilon = torch.finfo(torch.float32).eps
    if tiny != 'input':
        nn.init.constant_(layers[3].weight_quantizer.step, epsilon)
    if tiny != 'weight':
        nn.init.constant_(layers[3].input_quantizer.step, epsilon)
    lowered, _ = exported(network, trace(network, SHAPE), weights)
    codes = weight_codes(lowered, 'layers.0.weight_quantizer')
    assert not codes[2].any() and codes[0].any()


def weight_codes(lowered, name):
    (tensor,) = [
        tensor
        for tensor in lowered.model.graph.initializer
        if tensor.name == f'{name}.codes'
    ]
    return numpy_helper.to_array(tensor).astype(int)


def test_what_pytorch_cannot_express_is_one_line():
    network = prepared(quantized(nn.Conv2d(4, 4, 1)), Branches())
    with pytest.raises(UsageError, match='PyTorch cannot express') as error:
        to_onnx(network, images())
    assert '\n' not in str(error.value)


class Residual(nn.Module):
    """The stem of a ResNet and a block."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.block = nn.Sequential(
            quantized(nn.Conv2d(8, 8, 3, padding=1), 4),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            quantized(nn.Conv2d(8, 8, 3, padding=1), 4),
            nn.BatchNorm2d(8),
        )

    def forward(self, x):
        x = self.stem(x)
        return torch.relu(self.block(x) + x)


def test_quantized_residual_sums():
    network = prepared(Residual())
    lowered = to_onnx(network, images(), 'int8')
    assert lowered.float_layers == {
        'layers.0.block.3': 'its result goes on in float, to Add, which '
        '--residual int8 quantizes'
    }
    lowered = to_onnx(network, images(), 'int8', 'int8')
    counts, kernels = runtime.operators(lowered.model)
    assert list(kernels.values()) == ['QLinearConv'] * 2
    assert counts['QLinearAdd'] == 1 and not lowered.float_layers
    # the pooling gives floats, and its two takers quantize them
    nodes = {n.op_type: n for n in lowered.model.graph.node}
    pooled = nodes['MaxPool'].output[0]
    takers = [n for n in lowered.model.graph.node if pooled in n.input]
    assert [n.op_type for n in takers] == ['QuantizeLinear'] * 2
    expected = network(images()).detach()
    logits = run(lowered.model, images())
    difference = torch.from_numpy(logits) - expected
    assert abs(difference).max() < 0.02 * expected.max()


def test_without_a_residual_sum_the_option_changes_nothing(chain):
    network = convolutions(4)
    models = [
        to_onnx(network, images(), 'int8', kind, chain).model
        for kind in ('float', 'int8')
    ]
    assert models[0] == models[1]
