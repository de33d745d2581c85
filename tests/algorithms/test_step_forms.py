"""One step in several forms: kernels, memory, layout; always the same step."""

import weakref

import pytest
import torch

from mmauxq.errors import UsageError
from mmauxq.ops import use_form
from tests.networks import AUX, batch, joint_qat


def one_step(memory=None, form='auto', **settings):
    """Losses and gradients of the step after the one that calibrates."""
    model = joint_qat(memory=memory, **settings)
    inputs, samples = batch()
    with use_form(form):
        for _ in range(2):
            model.zero_grad()
            losses = model.loss(inputs, samples)
            sum(losses.values()).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return losses, grads, model


@pytest.mark.parametrize('memory', ['codes', 'recompute'])
@pytest.mark.parametrize('guidance', [None, AUX])
def test_less_memory_is_the_same_step_to_the_bit(memory, guidance):
    losses, grads, _ = one_step(guidance=guidance)
    found = one_step(memory, guidance=guidance)
    for name, loss in losses.items():
        assert torch.equal(found[0][name], loss), name
    for name, grad in grads.items():
        assert torch.equal(found[1][name], grad), name


def test_kernels_are_the_same_step():
    """Where there is no GPU they run in Triton's interpreter."""
    losses, grads, plain = one_step()
    found, found_grads, model = one_step(form='kernel')
    assert len(model._weights_at_once.pairs) == sum(
        not bits.is_float for bits in model.bits.values()
    )
    assert not plain._weights_at_once.pairs or torch.cuda.is_available()
    for name, loss in losses.items():
        torch.testing.assert_close(found[name], loss)
    for name, grad in grads.items():
        torch.testing.assert_close(
            found_grads[name], grad, rtol=1e-3, atol=1e-5, msg=name
        )


def test_channels_last_is_the_same_step():
    """But for rounding in the convolutions, which may move a code."""
    losses, _, _ = one_step()
    found, _, model = one_step(channels_last=True)
    conv = model.architecture.backbone.layer1[0].conv2
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    for name, loss in losses.items():
        torch.testing.assert_close(found[name], loss, rtol=0.02, atol=0.02)


def test_taps_are_released_before_the_backward_pass():
    model = joint_qat()
    alive = []
    model.architecture.backbone.layer1[0].register_forward_hook(
        lambda module, args, output: alive.append(weakref.ref(output))
    )
    losses = model.loss(*batch())
    del losses
    assert alive[0]() is None


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(memory='less'), r"memory='less'; allowed are \['codes', 'rec"),
        (dict(memory='codes', compile=True), "memory='codes' is for eager"),
    ],
)
def test_memory_that_cannot_be_had_is_one_line(settings, message):
    with pytest.raises(UsageError, match=message):
        joint_qat(**settings)
