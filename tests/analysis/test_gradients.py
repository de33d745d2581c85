import torch

from mmauxq.analysis import block_gradient_norms
from tests.networks import AUX, batch, joint_qat

BLOCKS = [f'backbone.layer{i}.0' for i in (1, 2, 3)]


def test_norms_of_both_losses_at_every_block():
    model = joint_qat()
    norms = block_gradient_norms(model, *batch())
    assert list(norms) == ['student', 'joint']
    assert all(list(blocks) == BLOCKS for blocks in norms.values())
    assert all(v > 0 for blocks in norms.values() for v in blocks.values())
    assert norms['student'] != norms['joint']


def test_a_norm_is_that_of_the_gradient():
    model = joint_qat()
    model.loss(*batch())
    expected = {}

    def keep(name):
        def hook(module, grad_input, grad_output):
            # the first pass only; the function under test runs it again
            expected.setdefault(name, grad_output[0].norm().item())

        return hook

    for name in BLOCKS:
        block = model.architecture.get_submodule(name)
        block.register_full_backward_hook(keep(name))
    model.loss(*batch())['student.loss'].backward()
    found = block_gradient_norms(model, *batch())['student']
    for name in BLOCKS:
        torch.testing.assert_close(found[name], expected[name])


def test_parameters_keep_their_gradients():
    model = joint_qat(guidance=None)
    assert list(block_gradient_norms(model, *batch())) == ['student']
    assert all(p.grad is None for p in model.parameters())


def test_both_passes_of_a_network_that_runs_twice():
    """Equal batch norms, as in the first step: the same as in one pass."""
    expected = block_gradient_norms(joint_qat(), *batch())
    model = joint_qat(guidance=dict(AUX, separate_bn=True))
    found = block_gradient_norms(model, *batch())
    for name, norms in expected.items():
        for block, norm in norms.items():
            torch.testing.assert_close(
                found[name][block], norm, rtol=1e-4, atol=1e-6
            )
    assert not model.guidance.second_pass._forward_pre_hooks
