"""Training, files and export of networks of any kind, without a config."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

import mmauxq
from mmauxq.algorithms.prepare import GUIDANCE
from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.deploy.slim import write_slim
from mmauxq.errors import UsageError
from mmauxq.quantizers import named_quantizers
from tests.networks import classifier

SHAPE = (3, 16, 16)


class Own(nn.Module):
    """A network of a user: two blocks, a classifier, no list of anything."""

    def __init__(self, classes=5):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2)
        self.second = nn.Conv2d(8, 12, 3)
        self.third = nn.Conv2d(12, 12, 3)
        self.last = nn.Linear(12, classes)

    def forward(self, images):
        x = F.relu(self.first(images))
        x = F.relu(self.third(F.relu(self.second(x))))
        return self.last(x.mean((2, 3)))


def convnext():
    setting = models.convnext.CNBlockConfig
    blocks = [setting(8, 16, 1), setting(16, None, 2)]
    return models.ConvNeXt(blocks, num_classes=5)


def swin():
    return models.SwinTransformer(
        [2, 2], 8, [2, 2], [2, 2], [2, 2], num_classes=5
    )


NETWORKS = {
    'own': Own,
    'resnet18': lambda: models.resnet18(num_classes=5),
    'mobilenet_v3': lambda: models.mobilenet_v3_small(
        num_classes=5, width_mult=0.25
    ),
    'convnext': convnext,
    'vit': lambda: models.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=5),
    'swin': swin,
}


def batch(count=4, shape=SHAPE):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, *shape, generator=generator)
    return images, torch.arange(count) % 5


def trained(net=None, steps=2, **settings):
    """A prepared network after some steps."""
    joint = mmauxq.prepare(net or Own(), SHAPE, 2, 2, **settings)
    optimizer = torch.optim.SGD(mmauxq.parameter_groups(joint), lr=0.001)
    for _ in range(steps):
        sum(joint.losses(*batch()).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return joint


@pytest.mark.parametrize('name', sorted(NETWORKS))
def test_networks_are_trained_saved_loaded_and_exported(name, tmp_path):
    net = NETWORKS[name]()
    before = copy.deepcopy(net.state_dict())
    joint = trained(net)
    assert not any(named_quantizers(net))
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    images, _ = batch()
    logits = joint.eval()(images)
    assert logits.shape == (4, 5)

    slim, packed = tmp_path / 'slim.pth', tmp_path / 'p.safetensors'
    assert mmauxq.save_slim(joint, slim) == slim.stat().st_size
    assert mmauxq.save_packed(joint, packed) == packed.stat().st_size
    assert read_checkpoint(slim)['state_dict'].keys() >= before.keys()
    for load, file in ((mmauxq.load_slim, slim), (mmauxq.load_packed, packed)):
        again = load(file, net)
        assert type(again) is type(net) and not again.training
        assert torch.equal(again(images), logits)
        counts = mmauxq.audit(again, images)
        assert counts and all(count.holds for count in counts)
    onnx = tmp_path / 'model.onnx'
    agreement = mmauxq.export_onnx(again, onnx, images)
    assert agreement.holds and agreement.same_class == 4
    import onnxruntime

    (found,) = onnxruntime.InferenceSession(onnx).run(
        None, {'images': images[:3].numpy()}
    )
    assert found.shape == (3, 5)


@pytest.mark.parametrize('guidance', [None, *GUIDANCE])
def test_the_losses_of_each_guidance(guidance):
    joint = trained(guidance=guidance)
    losses = joint.losses(*batch())
    kinds = {name.split('.')[0] for name in losses}
    assert kinds == ({'student', 'guidance'} if guidance else {'student'})
    sum(losses.values()).backward()
    names = [n for n, p in joint.named_parameters() if p.grad is None]
    assert all('teacher' in name for name in names)


def test_the_losses_are_cross_entropies():
    joint = trained()
    images, targets = batch()
    joint.eval()
    losses = joint.losses(images, targets)
    expected = F.cross_entropy(joint(images), targets)
    torch.testing.assert_close(losses['student.loss'], expected)
    one_hot = F.one_hot(targets, 5).float()
    mixed = joint.losses(images, one_hot)
    assert mixed.keys() == losses.keys()
    for name, value in losses.items():
        torch.testing.assert_close(mixed[name], value)


def test_a_loss_of_the_user_is_that_of_the_module_too():
    """Any function of logits and targets, whatever these are."""
    seen = []

    def loss(logits, targets):
        seen.append(targets)
        return (logits - targets['scores']).square().mean()

    joint = mmauxq.prepare(Own(), SHAPE, 2, 2, loss=loss)
    images, _ = batch()
    targets = dict(scores=torch.ones(4, 5))
    losses = joint.eval().losses(images, targets)
    expected = (joint(images) - 1).square().mean()
    torch.testing.assert_close(losses['student.loss'], expected)
    assert len(seen) == 2 and all(got is targets for got in seen)


def test_scales_from_a_batch_at_once():
    images, targets = batch()
    joint = mmauxq.prepare(Own(), SHAPE, 2, 2, images=images).eval()
    logits = joint(images)  # before any training
    joint.losses(images, targets)
    assert torch.equal(joint(images), logits)


def test_a_given_teacher():
    teacher = Own().eval()
    settings = dict(guidance='kd', teacher=teacher)
    joint = mmauxq.prepare(Own(), SHAPE, 2, 2, **settings)
    images, targets = batch()
    joint.eval()
    found = joint.losses(images, targets)['guidance.loss_logits']
    theirs, ours = teacher(images), joint(images)
    expected = F.kl_div(
        ours.log_softmax(1), theirs.softmax(1), reduction='batchmean'
    )
    torch.testing.assert_close(found, expected)
    assert all(p.requires_grad for p in teacher.parameters())


def test_bits_layers_and_taps_by_the_names_of_the_network():
    joint = mmauxq.prepare(
        Own(), SHAPE, 3, 4,
        guidance=dict(type='mmauxq.AuxAdaptorAggregator', taps=['second']),
        policy=dict(first=8, layers={'thi*': 6}),
    )  # fmt: skip
    bits = {k: (b.weight, b.activation) for k, b in joint.bits.items()}
    assert bits == {
        'backbone.first': (8, 8),
        'backbone.second': (3, 4),
        'backbone.third': (6, 6),
        'backbone.last': (32, 32),
    }
    assert [tap.name for tap in joint.taps] == ['stem', 'backbone.second']


def test_scales_do_not_decay():
    joint = trained()
    others, scales = mmauxq.parameter_groups(joint, weight_decay=0.1)
    assert (others['weight_decay'], scales['weight_decay']) == (0.1, 0.0)
    expected = {p for _, q in named_quantizers(joint) for p in q.parameters()}
    assert set(scales['params']) == expected
    every = {p for p in joint.parameters() if p.requires_grad}
    assert set(others['params']) | expected == every


def test_building_moves_no_generator():
    torch.manual_seed(3)
    net = Own()
    before = torch.get_rng_state()
    mmauxq.prepare(net, SHAPE, 2, 2, guidance='auxkd')
    assert torch.equal(torch.get_rng_state(), before)


def test_a_classifier_of_mmpretrain(tmp_path):
    from mmpretrain.registry import MODELS

    net = MODELS.build(dict(classifier(), _scope_='mmpretrain'))
    joint = mmauxq.prepare(net, (1, 8, 8), 2, 2)
    images = torch.randn(4, 1, 8, 8)
    losses = joint.losses(images, torch.arange(4))
    sum(losses.values()).backward()
    logits = joint.eval()(images)
    file = tmp_path / 'slim.pth'
    mmauxq.save_slim(joint, file, classes='abcdefghij')
    again = mmauxq.load_slim(file, net)
    assert torch.equal(again(images), logits)
    assert again._dataset_meta == dict(classes=list('abcdefghij'))
    with pytest.raises(UsageError, match='loss: expected None for a classif'):
        mmauxq.prepare(net, (1, 8, 8), 2, 2, loss=F.cross_entropy)


# --- other loops -------------------------------------------------------------


def test_mixed_precision():
    joint = mmauxq.prepare(Own(), SHAPE, 2, 2)
    with torch.autocast('cpu', torch.bfloat16):
        losses = joint.losses(*batch())
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert joint.architecture.backbone.second.weight.grad.isfinite().all()


# torch.compile looks at all tensors that go on after a graph break
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor')
def test_a_compiled_network_computes_the_same():
    joint = trained()
    images, targets = batch()
    expected = joint.losses(images, targets)
    sum(expected.values()).backward()
    gradients = [p.grad.clone() for p in joint.parameters()]
    joint.zero_grad()
    compiled = torch.compile(joint, backend='aot_eager')
    found = compiled(images, targets, mode='loss')
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    sum(found.values()).backward()
    for parameter, gradient in zip(joint.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


RANKS = """
import torch, mmauxq
from tests.test_api import Own, SHAPE, batch

torch.distributed.init_process_group('gloo')
rank = torch.distributed.get_rank()
torch.manual_seed(0)
joint = mmauxq.prepare(Own(), SHAPE, 2, 2, 'dsn')
images, targets = batch(8)
joint.losses(images, targets)  # the same scales everywhere
ddp = torch.nn.parallel.DistributedDataParallel(joint)
half = slice(4 * rank, 4 * rank + 4)
sum(ddp(images[half], targets[half], mode='loss').values()).backward()
weight = joint.architecture.backbone.second.weight.grad.clone()
joint.zero_grad()
sum(joint.losses(images, targets).values()).backward()
whole = joint.architecture.backbone.second.weight.grad
torch.testing.assert_close(weight, whole, atol=1e-4, rtol=0)
"""


def test_two_processes(tmp_path, run_python):
    """The mean gradient of two halves is that of the whole batch, with
    guidance that has no batch norms."""
    program = tmp_path / 'program.py'
    program.write_text(RANKS)
    done = run_python(
        '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2',
        program,
    )  # fmt: skip
    # each rank asserts; what two ranks print may be mixed
    assert done.returncode == 0, done.stderr


# --- bad input ---------------------------------------------------------------


class Two(Own):
    def forward(self, images):
        return super().forward(images), images


class Bare(nn.Module):
    def forward(self, images):
        return images.mean((2, 3))


@pytest.mark.parametrize(
    'net, settings, message',
    [
        (3, {}, 'net: expected a torch.nn.Module from images .* got int'),
        (Own, {}, 'net: expected a torch.nn.Module from images'),
        (Two(), {}, r'expected logits of shape \(N, K\), got a tuple'),
        (
            Bare(),
            dict(guidance=None),
            'expected a convolution or linear layer that runs',
        ),
        (Own(), dict(input_shape=(1, 16, 16)), r'forward pass on .* fails'),
        (Own(), dict(input_shape=(3, 4, 4)), r'forward pass on .* fails'),
        (Own(), dict(input_shape=3), 'three positive integers'),
        (Own(), dict(weight_bits=9), 'model.quantizers.weight: expected'),
        (Own(), dict(guidance='auxx'), "guidance: .*'auxx'.* did you mean"),
        (Own(), dict(guidance=dict(type='x')), 'guidance.type: expected mmau'),
        (Own(), dict(guidance='aux', teacher=Own()), 'teacher: expected guid'),
        (
            Own(),
            dict(guidance='kd', teacher=Own(7)),
            'guidance.teacher: expected 5 classes, those of F, got 7',
        ),
        (Own(), dict(policy=dict(layers={'no*': 8})), 'matches nothing'),
        (Own(), dict(quantizers=dict(weight=3)), 'model.quantizers: expected'),
    ],
)
def test_what_cannot_be_prepared(net, settings, message):
    arguments = dict(input_shape=SHAPE, weight_bits=2, activation_bits=2)
    with pytest.raises(UsageError, match=message) as error:
        mmauxq.prepare(net, **{**arguments, **settings})
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'targets, message',
    [
        (torch.zeros(4), r'got torch.float32 of shape \(4,\) from 0.0 to 0.0'),
        (torch.zeros(3, dtype=torch.int64), r'got torch.int64 of shape \(3,'),
        (torch.full((4,), 5), 'from 5 to 5'),
        (torch.full((4,), -1), 'from -1 to -1'),
        ([1, 2, 3, 4], 'got a list'),
        (None, 'got a NoneType'),
    ],
)
def test_targets_of_the_wrong_kind(targets, message):
    joint = mmauxq.prepare(Own(), SHAPE, 2, 2)
    with pytest.raises(UsageError, match=message) as error:
        joint.losses(batch()[0], targets)
    assert 'indices of 5 classes, int64 of shape (4,)' in str(error.value)


def test_a_loss_must_be_a_number():
    joint = mmauxq.prepare(Own(), SHAPE, 2, 2, loss=lambda x, y: x)
    with pytest.raises(UsageError, match=r'shape \(\), got \(4, 5\)'):
        joint.losses(*batch())


def test_files_want_a_trained_network_in_evaluation(tmp_path):
    untrained = mmauxq.prepare(Own(), SHAPE, 2, 2)
    for save in (mmauxq.save_slim, mmauxq.save_packed):
        with pytest.raises(UsageError, match='quantizers without a scale'):
            save(untrained, tmp_path / 'file')
        with pytest.raises(UsageError, match='what mmauxq.prepare returns'):
            save(Own(), tmp_path / 'file')
    joint = trained()
    images, _ = batch()
    with pytest.raises(UsageError, match='got one in training mode'):
        mmauxq.export_onnx(joint, tmp_path / 'model.onnx', images)
    with pytest.raises(UsageError, match='audit: expected a quantized netw'):
        mmauxq.audit(Own(), images)
    assert not list(tmp_path.iterdir())


def test_a_plain_loop_may_move_scales_below_zero(tmp_path):
    """They stand for the least positive one; what is saved can be loaded."""
    joint, (images, _) = trained(), batch()
    name, quantizer = next(iter(named_quantizers(joint.architecture)))
    quantizer.step.data.fill_(-0.5)
    expected = joint.eval()(images)
    mmauxq.save_slim(joint, tmp_path / 'slim.pth')
    quantizer.step.data.fill_(-0.5)
    state = copy.deepcopy(joint.state_dict())
    steps = state[f'architecture.{name}.step']
    assert (steps - 1e-6).abs().max() < 1e-9
    joint.load_state_dict(state)
    loaded = mmauxq.load_slim(tmp_path / 'slim.pth', Own())
    assert torch.equal(loaded(images), expected)


def test_a_file_of_another_network(tmp_path):
    joint, file = trained(), tmp_path / 'slim.pth'
    mmauxq.save_slim(joint, file)
    with pytest.raises(UsageError, match='expected the float network as the'):
        mmauxq.load_slim(file)
    with pytest.raises(UsageError, match='expected a checkpoint of this arc'):
        mmauxq.load_slim(file, Own(7))
    with pytest.raises(UsageError, match='slim.pth: '):
        mmauxq.load_slim(file, models.resnet18(num_classes=5))
    write_slim(file, joint.architecture.backbone.state_dict(), {})
    with pytest.raises(UsageError, match='expected a description of the net'):
        mmauxq.load_slim(file, Own())


def test_importing_stays_light():
    """The names are there, what they need comes when they are asked for."""
    text = (
        'import sys, mmauxq\n'
        'assert "mmpretrain" not in sys.modules\n'
        'assert not hasattr(mmauxq, "nothing")\n'
        'from mmauxq import prepare\n'
        'assert callable(prepare) and "onnx" not in sys.modules\n'
        'assert sorted(mmauxq.api.__all__) == sorted(mmauxq.API)\n'
    )
    subprocess.run([sys.executable, '-c', text], check=True)
