"""One quantized layer."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import nn

from mmauxq import layers
from mmauxq.errors import UsageError
from mmauxq.layers import (
    LayerBits,
    QuantLayer,
    WeightReader,
    convert,
    quant_class,
)
from mmauxq.network.profile import LayerTracer
from mmauxq.quantizers import LSQ, calibrate
from tests.layers.conftest import RenamedLinear


def quantize_layer(layer, *quantizers):
    return quant_class(type(layer)).from_float(layer, *quantizers)


def quantized(sample, bits=2):
    layer = quantize_layer(sample.layer, LSQ(bits, 'weight'), LSQ(bits))
    calibrate(layer, lambda: layer(sample.x))
    return layer


def test_forward_is_the_product_of_the_quantized_operands(sample):
    layer = quantized(sample)
    expected = sample.product(
        layer,
        layer.input_quantizer(sample.pad(sample.x)),
        layer.weight_quantizer(sample.weight(layer)),
    )
    assert torch.equal(layer(sample.x), expected)


def test_steps_are_calibrated_on_what_enters_the_product(sample):
    layer = quantized(sample)
    weight, step = sample.weight(layer), layer.weight_quantizer.step
    assert torch.equal(step, 2 * weight.abs().mean().reshape(1))


def test_gradients_are_those_of_the_product_of_quantized_operands(sample):
    layer = quantized(sample)
    tensors = list(layer.parameters())
    found = torch.autograd.grad(layer(sample.x).square().sum(), tensors)
    by_hand = sample.product(
        layer,
        layer.input_quantizer(sample.pad(sample.x)),
        layer.weight_quantizer(sample.weight(layer)),
    )
    expected = torch.autograd.grad(by_hand.square().sum(), tensors)
    assert all(map(torch.equal, found, expected))


def test_every_parameter_gets_a_gradient(sample):
    layer = quantized(sample)
    (layer(sample.x) - 1).square().sum().backward()
    assert all(bool(p.grad.any()) for p in layer.parameters())


def test_a_quantized_layer_is_still_of_its_class(sample):
    layer = quantized(sample)
    assert isinstance(layer, type(sample.layer))
    assert isinstance(layer, QuantLayer)


def test_the_class_says_what_it_was(sample):
    name = type(quantized(sample)).__name__
    assert name == f'Quant{type(sample.layer).__name__}'


def test_parameters_are_shared_under_the_same_names(sample):
    layer = quantized(sample)
    found = dict(layer.named_parameters())
    assert all(
        found[name] is parameter
        for name, parameter in sample.layer.named_parameters()
    )


def test_the_float_layer_stays_as_it_was(sample):
    before, kind = sample.layer(sample.x), type(sample.layer)
    quantized(sample)
    assert type(sample.layer) is kind
    assert list(sample.layer.children()) == []
    assert torch.equal(sample.layer(sample.x), before)


def test_loading_float_weights_misses_the_quantizers_only(sample):
    layer = quantized(sample)
    keys = layer.load_state_dict(sample.layer.state_dict(), strict=False)
    assert keys.unexpected_keys == []
    assert set(keys.missing_keys) == {
        f'{operand}_quantizer.{name}'
        for operand in ('weight', 'input')
        for name in ('step', 'signed', 'calibrated')
    }


def test_restore_gives_the_class_back(sample):
    assert type(quantized(sample).to_float()) is type(sample.layer)


def test_restore_gives_the_same_parameters_back(sample):
    found = dict(quantized(sample).to_float().named_parameters())
    expected = dict(sample.layer.named_parameters())
    assert list(found) == list(expected)
    assert all(found[name] is expected[name] for name in expected)


def test_restore_gives_the_float_output_back(sample):
    layer = quantized(sample).to_float()
    assert torch.equal(layer(sample.x), sample.layer(sample.x))


def test_a_copy_computes_the_same(sample):
    layer = quantized(sample)
    assert torch.equal(copy.deepcopy(layer)(sample.x), layer(sample.x))


def test_a_copy_shares_no_parameter(sample):
    layer = quantized(sample)
    twin = {id(p) for p in copy.deepcopy(layer).parameters()}
    assert twin.isdisjoint({id(p) for p in layer.parameters()})


def test_the_state_goes_through_a_file(sample):
    layer = quantized(sample)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = quantize_layer(
        copy.deepcopy(sample.layer), LSQ(2, 'weight'), LSQ(2)
    )
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(sample.x), layer(sample.x))


def test_hooks_survive_both_ways():
    calls = []
    layer = nn.Linear(3, 2)
    layer.register_forward_hook(lambda *_: calls.append('after'))
    layer.register_forward_pre_hook(lambda *_: calls.append('before'))
    there = quantize_layer(layer, nn.Identity(), nn.Identity())
    there(torch.randn(1, 3))
    there.to_float()(torch.randn(1, 3))
    assert calls == ['before', 'after'] * 2


def test_a_hook_sees_the_quantized_layer():
    seen = []
    layer = nn.Linear(3, 2)
    layer.register_forward_hook(lambda module, *_: seen.append(module))
    there = quantize_layer(layer, nn.Identity(), nn.Identity())
    there(torch.randn(1, 3))
    assert seen == [there]


def test_training_mode_is_kept():
    layer = quantize_layer(nn.Linear(3, 2).eval(), LSQ(2, 'weight'), LSQ(2))
    assert layer.training is False


def test_identity_quantizers_give_the_float_output(sample):
    layer = quantize_layer(sample.layer, nn.Identity(), nn.Identity())
    assert torch.equal(layer(sample.x), sample.layer(sample.x))


class TransposedLinear(nn.Linear):
    def forward(self, input):
        return input @ self.weight.t() + self.bias


def test_a_forward_without_a_known_product_is_refused():
    """It would stay float without a word."""
    layer = quantize_layer(TransposedLinear(3, 2), LSQ(2, 'weight'), LSQ(2))
    with pytest.raises(UsageError) as error:
        layer(torch.randn(1, 3))
    assert str(error.value) == (
        'TransposedLinear: expected a forward that calls F.conv1d, F.conv2d, '
        'F.conv3d or F.linear with its weight, found none; keep the layer '
        'float with policy.layers'
    )


@pytest.mark.parametrize(
    'layer', [nn.ConvTranspose2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU()]
)
def test_other_layers_are_refused(layer):
    with pytest.raises(TypeError) as error:
        quantize_layer(layer, nn.Identity(), nn.Identity())
    assert str(error.value) == (
        'expected a float Conv1d, Conv2d, Conv3d, Linear or '
        f'MultiheadAttention, got {type(layer).__name__}'
    )


def test_a_quantized_layer_is_not_quantized_again():
    layer = quantize_layer(nn.Linear(3, 2), nn.Identity(), nn.Identity())
    with pytest.raises(TypeError, match='float Conv1d, .*, got QuantLinear'):
        quantize_layer(layer, nn.Identity(), nn.Identity())


class Net(nn.Module):
    """A reader of a weight, a foreign subclass and plain layers."""

    def __init__(self, foreign):
        super().__init__()
        self.foreign = foreign
        self.read = nn.Linear(4, 4)
        self.plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, x):
        return self.plain(nn.functional.linear(x, self.read.weight))


def stored(module):
    return pickle.loads(pickle.dumps(module))


def test_a_layer_can_be_stored_whole(sample):
    layer = quantized(sample)
    twin = stored(layer)
    assert type(twin) is type(layer)
    assert torch.equal(twin(sample.x), layer(sample.x))
    assert type(twin.to_float()) is type(sample.layer)


def test_a_network_can_be_stored_whole(sample):
    net, x = Net(sample.layer), torch.randn(3, 4)
    tracer = LayerTracer(net, len(x))
    with tracer.following(), torch.no_grad():
        net(x)
        net.foreign(sample.x)
    cfg = dict(type='mmauxq.LSQ', bits=2)
    bits = {name: LayerBits(2, 2, '') for name in tracer.layers}
    net = convert(nn.Sequential(net), {f'0.{n}': b for n, b in bits.items()},
                  cfg, cfg, {f'0.{n}': in_0(u) for n, u in
                             tracer.layers.items()})[0]  # fmt: skip
    calibrate(net, lambda: (net(x), net.foreign(sample.x)))
    assert isinstance(net, WeightReader)
    twin = stored(net)
    assert torch.equal(twin(x), net(x))
    assert torch.equal(torch.compile(net, backend='eager')(x), net(x))
    assert torch.equal(twin.foreign(sample.x), net.foreign(sample.x))


def in_0(use):
    return dataclasses.replace(
        use, readers=[f'0.{r}' if r else '0' for r in use.readers]
    )


def test_hooks_are_not_shared(sample):
    calls = []
    sample.layer.register_forward_hook(lambda *_: calls.append('float'))
    layer = quantized(sample)
    layer.register_forward_hook(lambda *_: calls.append('quantized'))
    calls.clear()
    sample.layer(sample.x)
    assert calls == ['float']
    back = layer.to_float()
    back.register_forward_pre_hook(lambda *_: calls.append('back'))
    calls.clear()
    layer(sample.x)
    assert calls == ['float', 'quantized']


def identical(layer):
    """Quantized by quantizers that return what they are given."""
    return quantize_layer(layer, nn.Identity(), nn.Identity())


def test_a_hook_that_is_removed_stays_on_the_other():
    calls = []
    layer = nn.Linear(3, 2)
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    there = identical(layer)
    handle.remove()
    layer(torch.randn(1, 3))
    assert calls == []
    there(torch.randn(1, 3))
    assert calls == [1]


def test_children_added_to_one_are_not_on_the_other():
    layer = nn.Linear(3, 2)
    there = identical(layer)
    there.extra = nn.Identity()
    there.register_buffer('more', torch.ones(1))
    assert list(layer.named_children()) == list(layer.named_buffers()) == []


def test_a_precomputed_weight_is_used_for_that_weight_only():
    x, layer = torch.randn(2, 3), nn.Linear(3, 2, bias=False)
    there = identical(layer)
    result = torch.full_like(layer.weight, 7.0)
    weight = there.weight
    there.precomputed = lambda w: result if w is weight else None
    assert torch.equal(there(x), x @ result.t())
    there.weight = nn.Parameter(torch.ones(2, 3))
    assert torch.equal(there(x), x @ torch.ones(3, 2))


def test_what_was_precomputed_stays_with_its_layer():
    there = identical(nn.Linear(3, 2))
    there.precomputed = lambda w: torch.zeros_like(w)
    file = io.BytesIO()
    torch.save(there, file)  # a function of this file cannot be pickled
    for twin in (copy.deepcopy(there), there.to_float()):
        assert 'precomputed' not in twin.__dict__
    assert there.precomputed is not None


@pytest.mark.parametrize(
    'float_type, name',
    [
        (nn.Conv1d, 'QuantConv1d'),
        (nn.Conv2d, 'QuantConv2d'),
        (nn.Conv3d, 'QuantConv3d'),
        (nn.Linear, 'QuantLinear'),
        (nn.MultiheadAttention, 'QuantMultiheadAttention'),
    ],
)
def test_the_classes_of_torch_have_classes_of_their_own(float_type, name):
    cls = quant_class(float_type)
    assert cls is getattr(layers, name)
    assert cls.float_type is float_type
    assert issubclass(cls, float_type)


def test_there_is_one_class_for_each_class():
    assert quant_class(RenamedLinear) is quant_class(RenamedLinear)
    assert quant_class(RenamedLinear).float_type is RenamedLinear


@pytest.mark.parametrize('name', ['Linear', 'Conv2d'])
def test_wrappers_of_mmcv_are_torchs_layers(name):
    """A transformer of MMPretrain has half of its weights in them."""
    wrappers = pytest.importorskip('mmcv.cnn.bricks.wrappers')
    arguments = (4, 3) if name == 'Linear' else (4, 3, 1)
    x = torch.randn(2, 4) if name == 'Linear' else torch.randn(2, 4, 5, 5)
    wrapped = getattr(wrappers, name)(*arguments)
    plain = getattr(nn, name)(*arguments)
    plain.load_state_dict(wrapped.state_dict())
    found, expected = (
        quantize_layer(layer, LSQ(2, 'weight'), LSQ(2))
        for layer in (wrapped, plain)
    )
    assert found.multiplies_by_weight
    for layer in (found, expected):
        calibrate(layer, lambda layer=layer: layer(x))
    assert torch.equal(found(x), expected(x))
    assert type(found.to_float()) is type(wrapped)


def test_every_layer_can_be_compiled(sample):
    layer = quantized(sample)
    compiled = torch.compile(layer, backend='eager')
    assert torch.equal(compiled(sample.x), layer(sample.x))
