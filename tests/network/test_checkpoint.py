"""Which state dict belongs to which network."""

import copy

import pytest
import torch
from mmpretrain.registry import MODELS

from mmauxq.errors import UsageError
from mmauxq.network.checkpoint import (
    check_architecture,
    check_scales,
    is_joint,
    normalise,
)
from tests.networks import batch, captured, classifier, joint_qat

SCALES = 6 + 2  # quantized layers, each with two quantizers


def network(**backbone):
    return MODELS.build(classifier(**backbone))


@pytest.fixture
def joint():
    """Calibrated."""
    model = joint_qat()
    model.loss(*batch())
    return model


def refused(call, *args):
    """The one line that a call ends with."""
    with pytest.raises(UsageError) as error:
        call(*args)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    'keys, expected',
    [
        (['architecture.head.fc.weight'], True),
        (['module.architecture.head.fc.weight'], True),
        (['backbone.conv1.weight', 'head.fc.weight'], False),
        (['module.backbone.conv1.weight'], False),
    ],
)
def test_keys_of_a_training_checkpoint(keys, expected):
    assert is_joint(keys) is expected


@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: dict(state_dict=s)])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_the_state_of_f_in_any_checkpoint(joint, wrap, prefix):
    expected = joint.architecture.state_dict()
    for state in (joint.state_dict(), expected):
        state = {f'{prefix}{key}': value for key, value in state.items()}
        found = normalise(wrap(state), 'file')
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize(
    'content', [{}, dict(state_dict={}), dict(a=1), [1], None]
)
def test_what_holds_no_state_is_refused(content):
    assert refused(normalise, content, 'file') == (
        'file: holds no state dict of tensors'
    )


def test_float_and_quantized_states_fit(joint):
    for state in (network().state_dict(), joint.architecture.state_dict()):
        found = check_architecture(joint.architecture, state, 'file')
        assert found == state and found is not state


def test_what_is_missing_is_counted():
    state = network().state_dict()
    del state['backbone.conv1.weight'], state['head.fc.bias']
    assert refused(check_architecture, network(), state, 'file') == (
        'file: expected a checkpoint of this architecture (CIFARResNet), '
        'got one of another: '
        'backbone.conv1.weight is missing, and 1 more'
    )


def test_another_shape_and_another_type():
    state = network().state_dict()
    state['head.fc.weight'] = torch.ones(7, 16)
    assert refused(check_architecture, network(), state, 'file') == (
        'file: expected a checkpoint of this architecture (CIFARResNet), '
        'got one of another: '
        'head.fc.weight: expected shape (10, 16), got (7, 16); '
        'model.float_checkpoint takes a float checkpoint with another head'
    )
    state['head.fc.weight'] = torch.ones(10, 16).int()
    assert refused(check_architecture, network(), state, 'file') == (
        'file: expected a checkpoint of this architecture (CIFARResNet), '
        'got one of another: '
        'head.fc.weight: expected torch.float32, got torch.int32'
    )


def test_a_head_of_other_classes_may_be_left_out():
    model = network()
    state = model.state_dict()
    state['head.fc.weight'] = torch.ones(7, 16)
    with captured() as messages:
        found = check_architecture(model, state, 'file', other_head=True)
    assert 'head.fc.weight' in state
    assert found.keys() == state.keys() - {'head.fc.weight'}
    assert messages == [
        'file: head.fc.weight: expected shape (10, 16), got (7, 16); it '
        'starts from random weights'
    ]


def test_entries_without_a_place_are_named():
    """A deeper network has all that a shallower one asks for."""
    model = network()
    state = model.state_dict()
    state['backbone.layer9.weight'] = state['neck.scale'] = torch.ones(1)
    with captured() as messages:
        check_architecture(model, state, 'file')
    assert messages == [
        'file: 1 entries are left out, because this architecture has no place '
        'for them, such as backbone.layer9.weight; is it the checkpoint of a '
        'deeper network?'
    ]


def test_only_a_head_may():
    state = network().state_dict()
    state['backbone.conv1.weight'] = torch.ones(1)
    message = refused(check_architecture, network(), state, 'file', True)
    assert 'backbone.conv1.weight: expected shape (4, 1, 3, 3)' in message


def test_the_check_leaves_network_and_state_alone(joint):
    before = copy.deepcopy(joint.architecture.state_dict())
    state = network().state_dict()
    values = copy.deepcopy(state)
    check_architecture(joint.architecture, state, 'file')
    for name, value in joint.architecture.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert value.device.type == before[name].device.type
    assert all(torch.equal(state[name], values[name]) for name in values)


def test_entries_that_a_module_renames_as_it_loads():
    """As mmpretrain's attention does with older checkpoints."""
    model = network()
    conv = model.backbone.conv1

    def rename(state, prefix, *args):
        if f'{prefix}kernel' in state:
            state[f'{prefix}weight'] = state.pop(f'{prefix}kernel')

    conv._register_load_state_dict_pre_hook(rename)
    state = model.state_dict()
    state['backbone.conv1.kernel'] = state.pop('backbone.conv1.weight')
    found = check_architecture(model, state, 'file')
    assert 'backbone.conv1.kernel' in found


def test_scales_of_a_trained_network_fit(joint):
    state = joint.architecture.state_dict()
    check_scales(joint.architecture, state, 'file')
    check_scales(network(), network().state_dict(), 'file')


def test_a_float_checkpoint_of_a_quantized_network(joint):
    message = refused(
        check_scales, joint.architecture, network().state_dict(), 'file'
    )
    assert message == (
        'file: expected a quantized network, got a float one, without scales '
        f'for {2 * SCALES} quantizers; train from it with '
        'model.float_checkpoint=file, or test it with the config of the '
        'float network'
    )


def test_a_quantized_checkpoint_of_a_float_network(joint):
    state = joint.architecture.state_dict()
    message = refused(check_scales, network(), state, 'file')
    assert message.startswith(
        'file: expected a float network, got a quantized one, with backbone.'
    )


def test_scales_that_were_never_calibrated(joint):
    state = joint_qat().architecture.state_dict()
    message = refused(check_scales, joint.architecture, state, 'file')
    assert message.startswith(
        f'file: {2 * SCALES} quantizers have no calibrated scale, such as '
        'backbone.layer1.0.conv1.'
    )


def test_more_scales_than_the_config_quantizes(joint):
    fewer = joint_qat(policy=dict(layers={'backbone.layer3.*': 32}))
    state = joint.architecture.state_dict()
    message = refused(check_scales, fewer.architecture, state, 'file')
    assert message.startswith(
        'file: quantizes more than this config: backbone.layer3.0.conv'
    )


@pytest.mark.parametrize(
    'key, value, message',
    [
        ('head.fc.weight', float('nan'), 'expected finite numbers, got NaN'),
        ('head.fc.bias', float('inf'), 'expected finite numbers, got NaN or'),
        ('running_var', -1.0, 'expected variances from 0, got -1'),
        ('weight_quantizer', -0.5, 'expected steps above 0, got -0.5'),
        ('weight_quantizer', 0.0, 'expected steps above 0, got 0'),
        ('input_quantizer', float('nan'), 'expected finite numbers, got NaN'),
    ],
)
def test_values_that_no_training_gives(joint, key, value, message):
    state = joint.architecture.state_dict()
    name = next(n for n in state if key in n and state[n].is_floating_point())
    state[name] = torch.full_like(state[name], value)
    text = refused(check_architecture, joint.architecture, state, 'a.pth')
    assert text.startswith(f'a.pth: {name}: {message}')
    with pytest.raises(UsageError, match=name):  # the way of load_from
        joint.load_state_dict(state)
