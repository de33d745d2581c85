import json

import pytest
import torch

from mmauxq.engine.hooks import TransitionRateHook
from mmauxq.engine.hooks.transition_rate_hook import (
    changed,
    codes_of,
    weights_with_codes,
)
from mmauxq.errors import UsageError
from mmauxq.registry import HOOKS
from tests.networks import QUANTIZERS, batch, joint_qat
from tests.running import make_runner

HOOK = dict(type='mmauxq.TransitionRateHook')


def scalars(folder) -> list[dict]:
    """The lines of the log that have numbers of training."""
    (path,) = folder.glob('*/vis_data/scalars.json')
    lines = map(json.loads, path.read_text().splitlines())
    return [line for line in lines if 'loss' in line]


def test_weights_are_those_of_quantized_layers_once():
    model = joint_qat()
    layers = weights_with_codes(model, 'a test')
    assert len(layers) == 8
    assert 'backbone.conv1' not in layers  # float
    name = 'backbone.layer1.0.conv1'
    weight, quantizer = layers[name]
    assert weight is model.architecture.get_parameter(f'{name}.weight')
    assert quantizer.bits == 2
    weight.requires_grad_(False)
    layer = model.get_submodule('architecture.backbone.layer1.0.conv2')
    model.get_submodule('architecture.backbone.layer2.0').twin = layer
    assert layers.keys() - weights_with_codes(model, 'a test').keys() == {name}


def test_changed_counts_codes():
    a = [torch.tensor([1.0, 0, -2]), torch.tensor([[1.0]])]
    b = [torch.tensor([1.0, 1, 1]), torch.tensor([[1.0]])]
    assert changed(a, b).tolist() == [2, 0]


@pytest.mark.parametrize(
    'weight',
    [
        dict(type='mmauxq.LSQ', bits=2),
        dict(type='mmauxq.LSQPlus', bits=4, per_channel=True),
        dict(type='mmauxq.DoReFaWeight', bits=8),
        dict(type='mmauxq.L1ScaledWeight', bits=2, per_channel=True),
    ],
)
def test_codes_are_those_of_the_quantizers(weight):
    model = joint_qat(quantizers={**QUANTIZERS, 'weight': weight})
    model.calibrate(batch(4)[0])
    layers = weights_with_codes(model, 'a test')
    with torch.no_grad():
        for parameter, _ in layers.values():
            parameter.mul_(torch.randn_like(parameter) * 2)
    for codes, (parameter, quantizer) in zip(
        codes_of(layers), layers.values(), strict=True
    ):
        assert quantizer.training and codes.is_floating_point()
        expected = quantizer.eval().codes(parameter).float()
        assert torch.equal(codes, expected)


def test_each_step_is_told(tmp_path):
    model = joint_qat()
    runner = make_runner(
        tmp_path,
        model=model,
        custom_hooks=[dict(HOOK, interval=1)],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.3)),
    )
    seen = []
    keep = type(runner).call_hook

    def call_hook(self, name, **kwargs):
        keep(self, name, **kwargs)
        if name == 'after_train_iter':
            layers = weights_with_codes(model, 'a test')
            codes = codes_of(layers)
            seen.append(torch.cat([c.flatten() for c in codes]))

    runner.call_hook = call_hook.__get__(runner)
    runner.train()
    parts = [
        (a != b).double().mean().item()
        for a, b in zip(seen[1:], seen, strict=False)
    ]
    logged = [line.get('codes_changed') for line in scalars(tmp_path)]
    assert logged[0] is None and sum(parts) > 0
    assert logged[1:] == pytest.approx(parts)


def test_an_epoch_has_a_line(tmp_path):
    runner = make_runner(
        tmp_path,
        log_level='INFO',
        custom_hooks=[HOOK],
        train_cfg=dict(type='mmauxq.EpochLoop', max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.3)),
    )
    runner.train()
    (log,) = tmp_path.glob('*/*.log')
    lines = [x for x in log.read_text().splitlines() if 'an epoch ago' in x]
    assert len(lines) == 2
    assert 'most in backbone.layer' in lines[0]


@pytest.mark.parametrize('interval', [0, 1.5, True, '1'])
def test_bad_interval(interval):
    with pytest.raises(UsageError, match='interval: expected an integer from'):
        HOOKS.build(dict(HOOK, interval=interval))


def test_without_quantized_weights_it_says_so(tmp_path):
    quantizers = dict(
        weight=dict(type='mmauxq.LSQ', bits=32),
        activation=dict(type='mmauxq.LSQ', bits=8),
    )
    model = joint_qat(quantizers=quantizers)
    runner = make_runner(tmp_path, model=model)
    with pytest.raises(UsageError, match='expected a model with quantized we'):
        TransitionRateHook().before_train(runner)
