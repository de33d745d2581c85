"""Scales are found before the first step, in a pass that leaves no trace."""

import pytest
import torch
from torch import nn

from mmauxq.quantizers import named_quantizers, uncalibrated
from tests.networks import batch, captured, joint_qat


def skipping(model, probability):
    """Make the second block run in training only sometimes."""
    block = model.architecture.backbone.layer1[0]
    forward = block.forward

    def sometimes(x):
        if block.training and torch.rand(()) < probability:
            return x
        return forward(x)

    block.forward = sometimes
    return block


def test_a_layer_that_first_runs_later_is_calibrated_as_well():
    model = joint_qat(guidance=None)
    block = skipping(model, 1.0)
    model.loss(*batch())
    assert not uncalibrated(model.architecture)
    del block.forward
    losses = model.loss(*batch())
    assert torch.isfinite(losses['student.loss'])


def test_a_first_step_that_failed_can_be_repeated():
    model = joint_qat(guidance=None)
    head = model.architecture.head.fc
    handle = head.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(RuntimeError('out of memory'))
    )
    with pytest.raises(RuntimeError, match='out of memory'):
        model.loss(*batch())
    handle.remove()
    losses = model.loss(*batch(4))
    assert torch.isfinite(losses['student.loss'])


def test_calibrate_moves_nothing_else():
    model = joint_qat(guidance=None)
    dropout = nn.Dropout(0.5)
    model.architecture.backbone.layer1.append(dropout)
    before = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if '_quantizer' not in name
    }
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    model.calibrate(batch()[0])
    assert not uncalibrated(model.architecture)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    found = model.state_dict()
    assert all(torch.equal(found[n], v) for n, v in before.items())
    assert all(q.step.item() != 1 for _, q in named_quantizers(model))


def test_the_steps_are_those_of_the_first_batch():
    """The layers before a quantizer are quantized already."""
    model = joint_qat(guidance=None)
    model.calibrate(batch()[0])
    conv = model.architecture.backbone.layer1[0].conv2
    inputs = []
    conv.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.loss(*batch())
    expected = 2 * inputs[0].abs().mean() / conv.input_quantizer.qmax**0.5
    torch.testing.assert_close(conv.input_quantizer.step[0], expected)


@pytest.mark.parametrize(
    'weight, activation',
    [('LSQ', 'LSQ'), ('DoReFaWeight', 'DoReFaActivation')],
)
def test_low_bits_from_random_weights_warn(weight, activation):
    with captured() as messages:
        model = joint_qat(
            guidance=None,
            quantizers=dict(
                weight=dict(type=f'mmauxq.{weight}', bits=2),
                activation=dict(type=f'mmauxq.{activation}', bits=2),
            ),
        )
        for _ in range(2):
            model.loss(*batch())
    assert sum('WITHOUT A FLOAT CHECKPOINT' in m for m in messages) == 1
