import copy

import pytest
import torch
import torch.nn.functional as F
from mmpretrain.registry import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmauxq.errors import UsageError
from mmauxq.guidance import TapRecorder
from mmauxq.guidance.taps import layout_of
from tests.networks import Overwriting, batch, classifier, joint_qat


def network(**backbone):
    return MODELS.build(classifier(**backbone))


BLOCKS = [f'backbone.layer{i}.0' for i in (1, 2, 3)]


def test_an_overwritten_output_is_refused():
    model = Overwriting()
    with TapRecorder(model, ['first']) as recorder:
        model(torch.zeros(1, 1, 2, 2))
    assert recorder.changed() == ['first']
    with pytest.raises(UsageError, match='first is overwritten in place'):
        recorder.outputs()


def test_an_overwritten_output_is_copied_when_that_is_known():
    model = Overwriting()
    x = torch.randn(1, 1, 2, 2)
    with TapRecorder(model, ['first'], overwritten=['first']) as recorder:
        model(x)
    torch.testing.assert_close(
        recorder.outputs()['first'], model.first(x), rtol=0, atol=0
    )


def test_the_algorithm_copies_what_a_residual_sum_overwrites():
    """The tap before the addition: the last batch norm of a block."""
    model = joint_qat(
        guidance=dict(
            type='mmauxq.AuxAdaptorAggregator', taps='backbone.layer*.0.bn2'
        )
    )
    assert model.recorders[0].overwritten == {
        f'backbone.layer{i}.0.bn2' for i in (1, 2, 3)
    }
    seen = []
    norm = model.architecture.backbone.layer2[0].bn2
    norm.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    given = {}
    model.guidance.register_forward_pre_hook(
        lambda module, args: given.update(args[0])
    )
    model.loss(*batch())
    kept = given['backbone.layer2.0.bn2']
    assert torch.equal(kept, seen[0])
    assert kept.min() < 0  # before the addition and the ReLU


@pytest.mark.parametrize('part', ['conv2', 'bn2'])
def test_a_tap_follows_a_module_that_is_replaced(part):
    """By quantization, and by the conversion to synchronised batch norm."""
    model = joint_qat(
        guidance=dict(
            type='mmauxq.AuxAdaptorAggregator',
            taps=f'backbone.layer*.0.{part}',
        )
    )
    block = model.architecture.backbone.layer3[0]
    setattr(block, part, copy.deepcopy(getattr(block, part)))
    losses = model.loss(*batch())
    losses['guidance.loss_aux'].backward()
    assert block.conv1.weight.grad.abs().sum() > 0


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(3, 3)
        self.reentrant = True

    def forward(self, x):
        return checkpoint(self.inside, x, use_reentrant=self.reentrant)


def test_a_tap_inside_reentrant_checkpointing_is_refused():
    model = Checkpointed()
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(UsageError, match='inside activation checkpointing'):
        with TapRecorder(model, ['inside']):
            model(x)


def test_a_checkpointed_block_itself_sends_the_gradient():
    """``with_cp`` of mmpretrain: same loss and same gradients with it."""
    gradients = []
    for with_cp in (False, True):
        model = joint_qat(architecture=classifier(with_cp=with_cp))
        model.train()
        with (
            pytest.warns(UserWarning, match='use_reentrant')
            if (with_cp)
            else _no_context()
        ):
            losses = model.loss(*batch())
            losses['guidance.loss_aux'].backward()
        weight = model.architecture.backbone.layer1[0].conv1.weight
        gradients.append(weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


class _no_context:
    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None


def test_a_tap_that_is_not_a_tensor_is_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    model = nn.Sequential(Pair())
    with pytest.raises(UsageError, match='tokens from 0, got a tuple'):
        with TapRecorder(model, ['0']):
            model(torch.zeros(1))


def test_a_tap_that_did_not_run_is_refused():
    model = nn.ModuleDict(dict(a=nn.Identity(), b=nn.Identity()))
    with TapRecorder(model, ['a', 'b']) as recorder:
        model['a'](torch.zeros(1))
    with pytest.raises(UsageError, match='b did not run'):
        recorder.outputs()


def test_the_stem_is_what_enters_the_first_block():
    model = network().eval()
    x = torch.randn(2, 1, 8, 8)
    with TapRecorder(model, BLOCKS[::-1], stem=True) as recorder:
        model(x)
    outputs = recorder.outputs()
    assert list(outputs) == ['stem', *BLOCKS]
    backbone = model.backbone
    stem = F.relu(backbone.norm1(backbone.conv1(x)))
    torch.testing.assert_close(outputs['stem'], stem)


def test_no_hook_stays_behind():
    model = network()
    with TapRecorder(model, BLOCKS, stem=True):
        pass
    block = model.backbone.layer1[0]
    assert not block._forward_hooks and not block._forward_pre_hooks


@pytest.mark.parametrize(
    'shape, image, layout',
    [
        ((65, 6), (3, 8, 8), 'tokens'),
        ((4, 8, 8), (3, 16, 16), 'map'),
        ((8, 8, 4), (3, 16, 16), 'channels_last'),
        ((8, 4, 2), (3, 16, 8), 'map'),  # 4 : 2 as the image
        ((4, 2, 8), (3, 16, 8), 'channels_last'),
        ((8, 8, 8), (3, 16, 16), 'map'),  # either: channels first
        ((10,), (3, 8, 8), 'map'),
    ],
)
def test_layouts(shape, image, layout):
    assert layout_of(shape, image) == layout
