"""Where guidance reads a network."""

import copy

import pytest
import torch
from mmpretrain.registry import MODELS
from torch import nn

from mmauxq.errors import UsageError
from mmauxq.guidance import find_taps
from mmauxq.guidance.find_taps import find_blocks, resolve_taps
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


def test_a_stem_in_a_list():
    """As in a DenseNet, whose layers take the list of all features so far."""

    class Listening(nn.Sequential):
        def forward(self, features):
            return super().forward(features[0])

    model = network()
    model.backbone = nn.Sequential(
        nn.Conv2d(1, 2, 1), Listing(), Listening(nn.Conv2d(2, 3, 1))
    )
    model.forward = lambda x, mode: model.backbone(x)
    images = torch.randn(2, 1, 8, 8)
    taps = find_taps(TrainingPass(model, images), 'backbone.2', True)
    assert [tap.name for tap in taps.taps] == ['stem', 'backbone.2']
    with taps.recorder(model) as recorder:
        model.backbone(images)
    stem = recorder.outputs()['stem']
    assert torch.equal(stem, model.backbone[0](images))


class Listing(nn.Module):
    def forward(self, x):
        return [x]


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
