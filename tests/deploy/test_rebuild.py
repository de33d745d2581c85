"""What a file may say of its network, and what is built of it."""

import copy
import pickle

import pytest
import torch

import mmauxq
from mmauxq import compat
from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.deploy import slim_checkpoint
from mmauxq.deploy.rebuild import rebuild
from mmauxq.errors import UsageError
from tests.networks import batch, classifier, joint_qat

DEEP = dict(
    type='ConvMixer',
    arch=dict(embed_dims=2, depth=100000, patch_size=1, kernel_size=3),
)


@pytest.fixture
def slim(tmp_path):
    """The slim file of a trained network of MMPretrain; its model."""
    compat.enable()
    model = joint_qat()
    sum(model.loss(*batch()).values()).backward()
    meta = dict(
        description=model.description, dataset_meta=dict(classes=['a', 'b'])
    )
    torch.save(dict(meta=meta, state_dict=model.state_dict()), tmp_path / 'x')
    slim_checkpoint(tmp_path / 'x', tmp_path / 'slim.pth')
    return tmp_path / 'slim.pth', model.eval()


def test_a_network_of_mmpretrain_needs_no_other(slim):
    file, model = slim
    network = mmauxq.load_slim(file)
    images, _ = batch()
    assert torch.equal(network(images), model(images))
    assert type(network) is type(model.architecture)
    assert network._dataset_meta == dict(classes=['a', 'b'])
    assert torch.equal(mmauxq.load_slim(file.parent / 'x')(images),
                       model(images))  # fmt: skip


def test_the_description_is_plain(slim):
    """``torch.load`` with nothing allow-listed reads it."""
    file, model = slim
    meta = torch.load(file, weights_only=True)['meta']
    assert meta['description'] == model.description
    assert pickle.dumps(meta['description'])
    shape = meta['description']['input_shape']
    assert shape == list(model.cost.shape)


def changed(description, path, value):
    description = copy.deepcopy(description)
    *outer, last = path.split('.')
    inner = description
    for key in outer:
        inner = inner[key]
    inner[last] = value
    return description


@pytest.mark.parametrize(
    'path, value, message',
    [
        ('architecture.type', 'os.system', 'expected a part of a network'),
        ('architecture.type', 'mmpretrain.Accuracy', 'expected a part of'),
        ('architecture.backbone.type', 'TIMMBackbone', 'expected a part of'),
        ('architecture.backbone.type', ['ResNet'], 'expected a part of'),
        ('architecture.head.type', 'mmauxq.JointQAT', 'expected a part of'),
        ('architecture.head.loss.type', 'subprocess.Popen', 'a part of'),
        ('architecture.backbone.base_channels', 2**40, 'a number up to'),
        ('architecture.backbone.base_channels', 2**10, 'got a larger one'),
        ('architecture.backbone', DEEP, 'got a larger one'),
        ('architecture.backbone.depth', float('nan'), 'a number up to'),
        ('architecture.backbone.depth', 'x', 'slim.pth'),
        ('architecture', None, 'expected the float network as the second'),
        ('architecture', 3, 'slim.pth'),
        ('quantizers.weight.type', 'mmauxq.AuxAdaptorAggregator', 'LSQ'),
        ('quantizers.weight.type', 'os.system', 'expected a quantizer of'),
        ('quantizers.weight.bits', 10**9, 'model.quantizers.weight'),
        ('policy', dict(layers={'nothing*': 3}), 'matches nothing'),
        ('input_shape', [3, -1, 2**62], 'three positive integers'),
        ('input_shape', 'x', 'three positive integers'),
    ],
)
def test_nothing_else_is_built(slim, path, value, message):
    file, model = slim
    content = read_checkpoint(file)
    description = changed(content['meta']['description'], path, value)
    with pytest.raises(UsageError, match=message) as error:
        rebuild(description, content['state_dict'], None, 'slim.pth')
    assert '\n' not in str(error.value)
    assert str(error.value).startswith('slim.pth')


def test_files_to_start_from_are_not_opened(slim, monkeypatch):
    """The weights are in the file."""
    file, _ = slim
    content = read_checkpoint(file)
    missing = dict(type='Pretrained', checkpoint='/nowhere.pth')
    description = changed(
        content['meta']['description'],
        'architecture.backbone.init_cfg',
        missing,
    )
    network = rebuild(description, content['state_dict'], None, 'slim.pth')
    network.init_weights()


def test_a_network_that_was_built_already(tmp_path):
    """Its config is not known; the description says so."""
    from mmpretrain.registry import MODELS

    built = MODELS.build(dict(classifier(), _scope_='mmpretrain'))
    assert joint_qat(architecture=built).description['architecture'] is None


@pytest.mark.parametrize('content', [None, 3, {}, dict(quantizers={})])
def test_no_description(content):
    with pytest.raises(UsageError, match='expected a description of the net'):
        rebuild(content, {}, None, 'file')
