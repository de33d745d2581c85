import copy

import pytest
import torch
import torch.nn.functional as F
from mmpretrain.registry import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmauxq.errors import UsageError
from mmauxq.guidance import TapRecorder, find_taps
from mmauxq.guidance.find_taps import find_blocks, resolve_taps
from mmauxq.guidance.taps import layout_of
from mmauxq.network import TrainingPass
from tests.networks import batch, classifier, joint_qat


def network(**backbone):
    return MODELS.build(classifier(**backbone))


BLOCKS = [f'backbone.layer{i}.0' for i in (1, 2, 3)]


def test_blocks_of_a_resnet_are_its_residual_blocks():
    assert find_blocks(network()) == BLOCKS


@pytest.mark.parametrize(
    'kind, count',
    [(dict(type='MobileNetV2'), 17), (dict(type='ResNet', depth=50), 16)],
)
def test_blocks_of_other_networks(kind, count):
    model = nn.Module()
    model.backbone = MODELS.build(kind)
    assert len(find_blocks(model)) == count


def test_patterns_stay_on_their_level():
    model = network()
    assert resolve_taps(model, 'backbone.layer*.*') == BLOCKS
    assert resolve_taps(model, ['backbone.layer3.0', 'backbone.layer1.*']) == [
        'backbone.layer3.0',
        'backbone.layer1.0',
    ]


def test_unknown_tap_lists_what_exists():
    with pytest.raises(UsageError) as caught:
        resolve_taps(network(), ['backbone.layer9.*'])
    message = str(caught.value)
    assert message.startswith('guidance.taps: expected a pattern of names')
    assert BLOCKS[0] in message and '\n' not in message
    assert 'conv1' not in message  # blocks, where there are some


def test_unknown_tap_lists_all_modules_where_there_are_no_blocks():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.backbone = nn.Identity()
    with pytest.raises(UsageError) as caught:
        resolve_taps(model, 'none')
    message = str(caught.value)
    assert "got 'none', which matches nothing; there are" in message
    assert all(name in message for name in ('0', '1', 'backbone'))


class Overwriting(nn.Module):
    """Adds to the output of ``first`` in place, as residual sums do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 1)
        self.second = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        y = self.first(x)
        y += 1
        return self.second(F.relu(y))


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


def test_stage_ends_are_the_last_blocks_before_a_change_of_shape():
    model = network(depth=20)
    inputs = torch.randn(2, 1, 8, 8)
    every = find_taps(TrainingPass(model, inputs), 'auto', True)
    ends = find_taps(TrainingPass(model, inputs), 'stage_ends', True)
    assert [tap.name for tap in every.taps] == [
        'stem',
        *(f'backbone.layer{i}.{j}' for i in (1, 2, 3) for j in range(3)),
    ]
    # the stem is what enters the first of them
    assert [tap.name for tap in ends.taps] == [
        'stem',
        *(f'backbone.layer{i}.2' for i in (1, 2, 3)),
    ]
    assert [tap.shape for tap in ends.taps[1:]] == [
        (4, 8, 8),
        (8, 4, 4),
        (16, 2, 2),
    ]


def test_stage_ends_by_config():
    model = joint_qat(
        architecture=classifier(depth=20),
        guidance=dict(
            type='mmauxq.IntermediateClassifiers', taps='stage_ends'
        ),
    )
    assert set(model.loss(*batch())) == {
        'student.loss',
        *(f'guidance.loss_layer{i}.2' for i in (1, 2, 3)),
    }


class _Says(nn.Module):
    """Gives no tensor."""

    def forward(self):
        return 'text'


@pytest.mark.parametrize(
    'taps, message',
    [
        ('backbone.idle', 'backbone.idle did not run in a forward pass'),
        ('backbone.says', 'tokens from backbone.says, got a str'),
    ],
)
def test_modules_that_cannot_be_tapped(taps, message):
    model = network()
    model.backbone.idle, model.backbone.says = nn.Identity(), _Says()
    model.backbone.conv1.register_forward_hook(
        lambda *_: model.backbone.says() and None
    )
    with pytest.raises(UsageError, match=message) as error:
        find_taps(TrainingPass(model, torch.randn(2, 1, 8, 8)), taps)
    assert '\n' not in str(error.value)


def test_a_place_inside_checkpointing_is_found_out_before_training():
    model = network(with_cp=True)
    with pytest.raises(UsageError) as error:
        run = TrainingPass(model, torch.randn(2, 1, 8, 8))
        find_taps(run, 'backbone.layer1.0.conv1')
    assert str(error.value) == (
        'guidance.taps: backbone.layer1.0.conv1 runs inside activation '
        'checkpointing, where no gradient leads back from it; tap the '
        'checkpointed block itself, or set with_cp=False'
    )


def test_the_search_leaves_the_network_as_it_was():
    model = network()
    model.backbone.layer1.eval()  # as a frozen stage
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    inputs = torch.randn(2, 1, 8, 8)
    numbers = torch.random.get_rng_state()
    find_taps(TrainingPass(model, inputs), 'auto', True)
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert [m.training for m in model.modules()] == modes
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


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
