"""Weights are followed to the products that they enter."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmauxq.layers import (
    LayerBits,
    QuantLayer,
    QuantMultiheadAttention,
    WeightReader,
    convert,
    restore,
)
from mmauxq.layers.weight_uses import tensors_in
from mmauxq.network.profile import LayerTracer
from mmauxq.quantizers import calibrate

CFG = dict(type='mmauxq.LSQ', bits=2)


class Reader(nn.Module):
    """Multiplies by the weight of a child that it does not call."""

    def __init__(self, change=lambda weight: weight):
        super().__init__()
        self.qkv = nn.Linear(4, 6, bias=False)
        self.proj = nn.Linear(6, 4)
        self.change = change

    def forward(self, x):
        x = F.linear(input=x, weight=self.change(self.qkv.weight))
        return self.proj(x)


def trace(model, *args):
    tracer = LayerTracer(model, len(args[0]))
    with tracer.following(), torch.no_grad():
        model(*args)
    return tracer.layers


def quantized(model, *args):
    products = trace(model, *args)
    names = [p.name for p in products.values() if not p.reason]
    model = convert(
        model,
        {name: LayerBits(2, 2, '') for name in names},
        CFG,
        CFG,
        products,
    )
    calibrate(model, lambda: model(*args))
    return model


@pytest.fixture
def x():
    return torch.randn(2, 3, 4)


CHANGES = {
    'as it is': lambda w: w,
    'standardised': lambda w: F.normalize(w - w.mean(1, keepdim=True)),
    'cut': lambda w: torch.cat(w.chunk(2)[::-1]),
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_a_weight_that_is_read_is_found(x, change):
    products = trace(Reader(change), x)
    assert list(products) == ['qkv', 'proj']
    assert products['qkv'].readers == ['']
    assert not products['qkv'].called
    assert products['proj'].called and not products['proj'].readers


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_a_weight_that_is_read_is_quantized(x, change):
    model = quantized(nn.Sequential(Reader(change)), x)[0]
    assert isinstance(model, WeightReader)
    qkv, proj = model.qkv, model.proj
    weight = qkv.weight_quantizer(change(qkv.weight))
    assert len(weight.unique()) <= 4
    expected = proj(F.linear(qkv.input_quantizer(x), weight))
    assert torch.equal(model(x), expected)


def test_a_reader_can_be_copied_and_restored(x):
    model = nn.Sequential(Reader())
    before = model(x)
    quantized(model, x)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert not torch.equal(model(x), before)
    restore(model)
    assert torch.equal(model(x), before)
    assert type(model[0]) is Reader


def test_a_hook_on_a_reader_does_not_fire_on_the_float_module(x):
    """Nor the other way round."""
    calls = []
    module = Reader()
    reader = quantized(module, x)
    back = reader.to_float()
    each = dict(float=module, reader=reader, restored=back)
    for name, owner in each.items():
        owner.register_forward_hook(lambda *_, name=name: calls.append(name))
    for name, owner in each.items():
        calls.clear()
        owner(x)
        assert calls == [name]


def test_a_reader_computes_also_with_some_of_its_layers_in_float(x):
    model = quantized(nn.Sequential(Reader()), x)
    expected = model[0].proj(F.linear(x, model[0].qkv.weight))
    restore(model, ['0.qkv'])
    assert isinstance(model[0], WeightReader)
    assert torch.equal(model(x), expected)


def test_a_module_and_its_parent_may_both_read(x):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Reader()
            self.own = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(self.inner(x), self.own.weight)

    model = quantized(nn.Sequential(Outer()), x)[0]
    assert isinstance(model, WeightReader)
    assert isinstance(model.inner, WeightReader)
    reached = []
    for layer in (model.own, model.inner.qkv, model.inner.proj):
        layer.weight_quantizer.register_forward_hook(
            lambda *_: reached.append(1)
        )
    model(x)
    assert len(reached) == 3


def test_the_weights_of_subclasses_are_their_own(x):
    class Standardised(nn.Linear):
        def forward(self, x):
            return F.linear(x, F.normalize(self.weight), self.bias)

    products = trace(nn.Sequential(Standardised(4, 2)), x)
    assert products['0'].called and not products['0'].reason


def test_a_layer_that_runs_twice_is_one_layer(x):
    layer = nn.Linear(4, 4)
    assert list(trace(nn.Sequential(layer, layer), x)) == ['0']


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.fc.weight.t()


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(x, self.a.weight + self.b.weight)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(4))

    def forward(self, x):
        return F.linear(x, self.matrix)


@pytest.mark.parametrize(
    'kind, name, reason',
    [
        (Transposed, '0.fc', 'its weight enters `matmul`'),
        (Mixture, '0.b', '0 multiplies by a mixture of it and other weights'),
        (Bare, '0', 'its weight is a parameter of its own, in no layer'),
    ],
)
def test_what_cannot_be_quantized_says_why(x, kind, name, reason):
    assert trace(nn.Sequential(kind()), x)[name].reason == reason


def test_products_of_data_are_no_layers(x):
    class Attention(nn.Module):
        def forward(self, x):
            return F.linear(x, x[0]) @ x

    assert trace(Attention(), x) == {}


class SelfAttention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, **settings)

    def forward(self, q, *others, **masks):
        return self.attn(q, *(others or (q, q)), **masks)


MASKS = {
    'none': {},
    'causal': dict(attn_mask=torch.ones(5, 5).triu(1).bool()),
    'added': dict(attn_mask=torch.randn(5, 5)),
    'padding': dict(
        key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    ),
    'no weights': dict(need_weights=False),
    'weights per head': dict(average_attn_weights=False),
}


@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize('masks', MASKS.values(), ids=MASKS)
def test_attention_computes_what_the_float_one_does(batch_first, masks):
    model = SelfAttention(batch_first=batch_first).eval()
    x = torch.randn(2, 5, 8) if batch_first else torch.randn(5, 2, 8)
    with torch.no_grad():
        expected = model(x, **masks)
        convert(model, {'attn': LayerBits(8, 32, '')}, CFG, CFG)
        model.attn.weight_quantizer = nn.Identity()
        found = model(x, **masks)
    for mine, its in zip(found, expected, strict=True):
        assert (mine is None) == (its is None)
        if its is not None:
            torch.testing.assert_close(mine, its)


def test_attention_between_two_sequences():
    model = SelfAttention(batch_first=True).eval()
    q, k = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    with torch.no_grad():
        expected, _ = model(q, k, k + 1)
        convert(model, {'attn': LayerBits(8, 32, '')}, CFG, CFG)
        model.attn.weight_quantizer = nn.Identity()
        found, _ = model(q, k, k + 1)
    torch.testing.assert_close(found, expected)


def test_all_projections_of_attention_are_quantized():
    model = SelfAttention(batch_first=True)
    x = torch.randn(2, 5, 8)
    assert list(trace(model, x)) == ['attn', 'attn.out_proj']
    quantized(model, x)
    attn = model.attn
    assert isinstance(attn, QuantLayer)
    assert isinstance(attn.out_proj, QuantLayer)
    output, _ = model(x)
    output.sum().backward()
    for layer in (attn, attn.out_proj):
        assert layer.weight_quantizer.calibrated
        assert layer.input_quantizer.calibrated
        assert layer.weight_quantizer.step.grad is not None
    assert len(attn.weight_quantizer(attn.in_proj_weight).unique()) <= 4
    restore(model)
    assert type(model.attn) is nn.MultiheadAttention


def test_attention_with_separate_projections_says_so():
    model = SelfAttention(batch_first=True, kdim=4, vdim=4)
    q, k = torch.randn(2, 5, 8), torch.randn(2, 7, 4)
    assert 'separate' in trace(model, q, k, k)['attn'].reason


def test_attention_goes_through_a_file_whole():
    model = SelfAttention(batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    quantized(model, x)
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded.attn) is QuantMultiheadAttention
    assert torch.equal(loaded(x)[0], model(x)[0])


def test_tensors_are_found_in_any_nesting():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    found = tensors_in(((a, None), [b, ('text', [c])], dict(d=a)))
    assert [id(t) for t in found] == [id(a), id(b), id(c)]
    assert tensors_in(a) == [a]
    assert tensors_in('text') == []
