"""One step in several forms: kernels, memory, layout; always the same step."""

import weakref

import pytest
import torch

from mmauxq.accelerate.kernels.dispatch import use_form
from mmauxq.accelerate.recompute import Recompute
from tests.networks import AUX, batch, classifier, joint_qat


def one_step(memory=None, form='auto', device='cpu', start=None, **settings):
    """Losses and gradients of the step after the one that calibrates."""
    model = joint_qat(memory=memory, **settings).to(device)
    if start:
        model.load_state_dict(start)
    inputs, samples = batch()
    inputs, samples = inputs.to(device), [s.to(device) for s in samples]
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
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.backends.cudnn.allow_tf32 = False
    losses, grads, plain = one_step(form='reference', device=device, speed={})
    found, found_grads, model = one_step(
        form='kernel', device=device, speed={}
    )
    assert len(model.step.weights.entries) == sum(
        not bits.is_float for bits in model.bits.values()
    )
    assert not plain.step.weights.entries
    for name, loss in losses.items():
        torch.testing.assert_close(found[name], loss)
    for name, grad in grads.items():
        torch.testing.assert_close(
            found_grads[name], grad, rtol=1e-3, atol=1e-5, msg=name
        )


def test_channels_last_is_the_same_step():
    """But for rounding in the convolutions, which may move a code of 8 bits.

    Random weights are drawn in the order of the memory, hence ``start``.
    """
    # With 4 channels, the gradient of a 1 x 1 convolution of stride 2 in this
    # layout corrupts the heap on processors without AVX-512 (torch 2.11.0).
    settings = dict(
        architecture=classifier(base_channels=8),
        quantizers=dict(
            weight=dict(type='mmauxq.LSQ', bits=8),
            activation=dict(type='mmauxq.LSQ', bits=8),
        ),
    )
    start = joint_qat(**settings).state_dict()
    losses, grads, _ = one_step(start=start, **settings)
    found, found_grads, model = one_step(
        start=start, channels_last=True, **settings
    )
    conv = model.architecture.backbone.layer1[0].conv2
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    for name, loss in losses.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-4, atol=0)
    for name, grad in grads.items():
        difference = (found_grads[name] - grad).norm()
        assert difference <= 1e-2 * grad.norm(), name


@pytest.mark.parametrize('guidance', [None, AUX])
def test_a_compiled_step_returns_logits_alone(guidance):
    """What it returns besides would be filled with gradients of zero."""
    returned = []

    def backend(module, inputs):
        node = next(n for n in module.graph.nodes if n.op == 'output')
        returned.append([tuple(n.meta['example_value'].shape)
                         for n in node.args[0]])  # fmt: skip
        return module.forward

    losses, _, _ = one_step(guidance=guidance, compile=dict(backend=backend))
    plain, _, _ = one_step(guidance=guidance)
    (shapes,) = returned
    assert shapes == [(8, 10)] * (1 if guidance is None else 2)
    for name, loss in plain.items():
        torch.testing.assert_close(losses[name], loss)


@pytest.mark.slow
def test_a_compiled_step_keeps_less():
    """What the compiler's partition hands over to the backward pass."""
    from functorch.compile import (
        make_boxed_func,
        min_cut_rematerialization_partition,
    )
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    kept = []

    def count(module, inputs):
        outputs = next(n for n in module.graph.nodes if n.op == 'output')
        kept.append(sum(
            n.meta['val'].numel() for n in outputs.args[0] if n is not None
            and n.op != 'placeholder' and torch.is_tensor(n.meta['val'])
        ))  # fmt: skip
        return make_boxed_func(module.forward)

    def backend():
        return aot_autograd(
            fw_compiler=count,
            bw_compiler=lambda module, _: make_boxed_func(module.forward),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )

    plain, grads, _ = one_step(compile=dict(backend=backend()))
    for memory in ('codes', 'recompute'):
        losses, found, _ = one_step(memory, compile=dict(backend=backend()))
        assert kept.pop() < 0.6 * kept[0], memory
        for name, loss in plain.items():
            torch.testing.assert_close(losses[name], loss)
        for name, grad in grads.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5)
    assert len(kept) == 1


@pytest.mark.parametrize('speed', ['eager', {}])
def test_taps_are_released_before_the_backward_pass(speed):
    model = joint_qat(speed=speed)
    model.calibrate(batch()[0])
    alive = []
    model.architecture.backbone.layer1[0].register_forward_hook(
        lambda module, args, output: alive.append(weakref.ref(output))
    )
    losses = model.loss(*batch())
    del losses
    assert len(alive) == 1 and alive[0]() is None


@pytest.mark.parametrize('compile', [None, dict(backend='eager')])
def test_less_memory_from_the_first_step_on(compile, monkeypatch):
    """Also in the one that calibrates, which is eager in any case."""
    entered = []
    enter = Recompute.__enter__
    monkeypatch.setattr(
        Recompute, '__enter__', lambda s: (entered.append(s), enter(s))[1]
    )
    model = joint_qat(memory='codes', compile=compile)
    model.loss(*batch())
    assert len(entered) == 1
    model.loss(*batch())
    assert len(entered) == (2 if compile is None else 1)


def test_an_eager_step_in_between():
    """As for hooks that must see the blocks."""
    compiled = []

    def backend(module, inputs):
        compiled.append(module)
        return module.forward

    model = joint_qat(compile=dict(backend=backend))
    model.calibrate(batch()[0])
    seen = []
    model.architecture.backbone.layer1[0].register_forward_hook(
        lambda *_: seen.append(torch.compiler.is_compiling())
    )
    model.loss(*batch())
    with model.eager():
        model.loss(*batch())
    assert (seen, compiled) == ([False, False], [])
    model.loss(*batch())
    assert len(compiled) == 1
