"""F's blocks inside of its float network."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import nn

from mmauxq import compat, prepare
from mmauxq.deploy.slim import slim_checkpoint
from mmauxq.engine.hooks import TeacherCheckHook
from mmauxq.errors import UsageError
from mmauxq.guidance.block_replacement import BlockReplacer
from tests.networks import AUX, batch, captured, classifier, joint_qat
from tests.running import make_runner

BWR = dict(type='mmauxq.BlockReplacement')
KD = dict(type='mmauxq.KnowledgeDistillation')
STAGES = ['backbone.layer1.0', 'backbone.layer2.0', 'backbone.layer3.0']


@pytest.fixture
def float_file(tmp_path):
    """Weights and statistics of a float network, as if it were trained."""
    torch.manual_seed(7)
    network = MMPRETRAIN_MODELS.build(classifier())
    network.init_weights()
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand_like(buffer))
    nn.init.normal_(network.head.fc.weight)
    file = tmp_path / 'float.pth'
    torch.save(dict(meta={}, state_dict=network.state_dict()), file)
    return str(file)


def precise(file, **settings):
    """An algorithm in float64 that has started, and images."""
    model = joint_qat(guidance=dict(BWR, checkpoint=file, **settings))
    images, samples = batch()
    model.double().loss(images.double(), samples)
    return model, images.double()


def tapped(model, images):
    """Name -> output of F at the taps of the stages, in training."""
    network, seen = model.architecture.train(), {}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: seen.update({name: out.clone()})
        )
        for name in STAGES
    ]
    network(images, mode='tensor')
    for handle in handles:
        handle.remove()
    return seen


def path(teacher, tap, x):
    """Logits of the rest of the float network behind a tap, by hand."""
    for name in STAGES[STAGES.index(tap) + 1 :]:
        x = teacher.get_submodule(name)(x)
    return teacher.head(teacher.neck((x,)))


@pytest.mark.parametrize('taps', [STAGES, STAGES[1:2], 'auto'])
def test_logits_are_those_of_the_rest_of_the_float_network(float_file, taps):
    model, images = precise(float_file, taps=taps)
    guidance, seen = model.guidance, tapped(model, images)
    network = guidance.teacher.network
    found = guidance(dict(image=images, **seen))
    names = STAGES if taps == 'auto' else taps
    assert guidance.names == names
    assert found.shape == (1 + len(names), 8, 10)
    assert found.dtype == torch.float64
    expected = [network(images, mode='tensor')]
    expected += [path(network, name, seen[name]) for name in names]
    torch.testing.assert_close(
        found, torch.stack(expected), rtol=1e-12, atol=1e-12
    )


def test_the_gradient_is_that_of_one_path_after_the_other(float_file):
    model, images = precise(float_file)
    labels, guidance = torch.arange(8), model.guidance
    network, parameters = guidance.teacher.network, []
    gradients = []
    for together in (True, False):
        seen = tapped(model, images)
        theirs = network(images, mode='tensor').detach()
        if together:
            theirs, *paths = guidance(dict(image=images, **seen))
            theirs = theirs.detach()
        else:
            paths = [path(network, name, seen[name]) for name in STAGES]
        target = theirs.softmax(1)
        loss = sum(
            F.cross_entropy(z, labels)
            + F.kl_div(z.log_softmax(1), target, reduction='batchmean')
            for z in paths
        )
        parameters = dict(model.architecture.backbone.named_parameters())
        gradients.append(
            torch.autograd.grad(loss / 3, list(parameters.values()))
        )
    for name, found, expected in zip(parameters, *gradients, strict=True):
        assert expected.abs().sum() > 0, name
        torch.testing.assert_close(
            found, expected, rtol=1e-10, atol=1e-10, msg=name
        )


@pytest.mark.parametrize('tau', [None, 1.0, 4.0])
def test_the_loss_is_the_mean_over_the_paths(float_file, tau):
    distance = tau and dict(type='mmrazor.KLDivergence', tau=tau)
    settings = dict(checkpoint=float_file, logits=distance, loss_weight=0.5)
    model = joint_qat(guidance=dict(BWR, **settings))
    images, samples = batch()
    model.loss(images, samples)
    seen = tapped(copy.deepcopy(model), images)
    with torch.no_grad():
        theirs, *paths = model.guidance(dict(image=images, **seen))
    labels, expected = torch.arange(8) % 10, 0
    for z in paths:
        expected += F.cross_entropy(z, labels)
        if tau:
            expected += tau**2 * F.kl_div(
                (z / tau).log_softmax(1),
                (theirs / tau).softmax(1),
                reduction='batchmean',
            )
    losses = model.loss(images, samples)
    assert set(losses) == {'student.loss', 'guidance.loss_replaced'}
    torch.testing.assert_close(
        losses['guidance.loss_replaced'], 0.5 * expected / 3
    )


def test_blocks_behind_the_last_tap_and_the_head_learn_from_f_alone():
    model = joint_qat(guidance=dict(BWR, taps=STAGES[:1]))
    model.loss(*batch())['guidance.loss_replaced'].backward()
    backbone = model.architecture.backbone
    assert backbone.layer1[0].conv1.weight.grad.abs().sum() > 0
    assert backbone.layer2[0].conv1.weight.grad is None
    assert model.architecture.head.fc.weight.grad is None
    assert all(p.grad is None for p in model.guidance.parameters())


def test_the_float_network_is_frozen_as_f_starts():
    model = joint_qat(guidance=BWR)
    with captured() as messages:
        model.loss(*batch())
    text = 'the teacher has the weights that F starts from'
    assert f'BlockReplacement: {text}' in messages
    network = model.train().guidance.teacher.network
    before = copy.deepcopy(network.state_dict())
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for seed in range(2):
        sum(model.loss(*batch(seed=seed)).values()).backward()
        optimizer.step()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
        own = model.architecture.state_dict()[name]
        assert 'conv' not in name or not torch.equal(value, own), name


def test_modules_without_a_given_tensor_return_what_they_would():
    """As when the accuracy of the float network is measured."""
    model = joint_qat(guidance=BWR)
    model.loss(*batch())
    images, _ = batch(seed=3)
    network = model.guidance.teacher.network
    found, read = model.guidance.teacher(images)
    assert torch.equal(found, network(images, mode='tensor')) and not read
    replacer = BlockReplacer(network, STAGES[:1])
    replacer.given[STAGES[0]] = torch.zeros(3, 4, 8, 8)
    with replacer:
        assert len(network(images, mode='tensor')) == 8 + 3
    assert len(network(images, mode='tensor')) == 8


def test_the_cost_counts_the_paths():
    """What is behind each tap, and the whole once."""
    costs = {
        names: joint_qat(
            guidance=dict(BWR, taps=list(names))
        ).cost.guidance_multiply_adds
        for names in ((name,) for name in STAGES)
    }
    whole = joint_qat(guidance=None).cost.multiply_adds
    behind = [cost - whole for cost in costs.values()]
    assert behind[0] > behind[1] > behind[2] == 16 * 10
    together = joint_qat(guidance=dict(BWR, taps=STAGES)).cost
    assert together.guidance_multiply_adds == whole + sum(behind)
    assert together.guidance_parameters == together.parameters


def test_beside_others(float_file):
    """Each term is that of the guidance alone."""
    alone = joint_qat(guidance=dict(BWR, checkpoint=float_file))
    both = joint_qat(
        guidance=[
            dict(BWR, checkpoint=float_file),
            dict(KD, checkpoint=float_file),
            AUX,
        ]
    )
    expected, found = alone.loss(*batch()), both.loss(*batch())
    assert len(found) == 4
    torch.testing.assert_close(
        found['guidance.0.loss_replaced'], expected['guidance.loss_replaced']
    )


@pytest.mark.parametrize('dtype', [None, 'float32'])
def test_mixed_precision(float_file, dtype):
    model = joint_qat(guidance=dict(BWR, checkpoint=float_file, dtype=dtype))
    seen = []
    model.guidance.register_forward_hook(
        lambda m, a, out: seen.append(out.dtype)
    )
    with torch.autocast('cpu', torch.bfloat16):
        loss = model.loss(*batch())['guidance.loss_replaced']
    assert seen == [torch.float32 if dtype else torch.bfloat16]
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    loss.backward()


@pytest.mark.parametrize('guidance', ['bwr', dict(BWR, taps=['0', '1'])])
def test_a_network_of_ones_own_with_a_teacher(guidance):
    def net():
        return nn.Sequential(
            *(nn.Conv2d(4 if i else 1, 4, 3, padding=1) for i in range(3)),
            nn.Flatten(),
            nn.Linear(256, 10),
        )

    torch.manual_seed(0)
    own, other = net(), net()
    joint = prepare(own, (1, 8, 8), guidance=guidance, teacher=other)
    images, _ = batch()
    losses = joint.losses(images, torch.arange(8))
    assert losses['guidance.loss_replaced'] > 0
    torch.testing.assert_close(
        joint.guidance.teacher(images)[0], other(images)
    )


# --- training ----------------------------------------------------------------


def test_trained_resumed_and_made_slim(tmp_path):
    def model(seed=0):
        return joint_qat(seed, guidance=BWR)

    whole = make_runner(
        tmp_path / 'whole',
        model=model(),
        train_cfg=dict(type='mmauxq.EpochLoop', max_epochs=2),
    )
    whole.train()
    first = tmp_path / 'whole/epoch_1.pth'
    resumed = make_runner(
        tmp_path / 'resumed',
        # its own start is another one, and so would be T
        model=model(seed=3),
        train_cfg=dict(type='mmauxq.EpochLoop', max_epochs=2),
        load_from=str(first),
        resume=True,
    )
    resumed.train()
    assert whole.iter == resumed.iter == 8
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    stored = torch.load(first, weights_only=False)['state_dict']
    assert any('guidance.teacher.network' in name for name in stored)

    slim = tmp_path / 'slim.pth'
    slim_checkpoint(tmp_path / 'whole/epoch_2.pth', slim)
    found = torch.load(slim, weights_only=True)['state_dict']
    assert set(found) == set(whole.model.architecture.state_dict())
    plain = joint_qat(guidance=None, seed=5)
    plain.load_state_dict(found)
    images, _ = batch(seed=4)
    assert torch.equal(
        plain.eval()(images), whole.model.eval()(images, mode='tensor')
    )


def test_a_float_network_that_guesses_is_refused():
    model = joint_qat(guidance=dict(BWR, least_accuracy=100))
    images, samples = batch()
    loader = [dict(inputs=list(images), data_samples=samples)]
    loop = SimpleNamespace(dataloader=loader)
    runner = SimpleNamespace(model=model, val_loop=loop)
    with (
        captured() as messages,
        pytest.raises(UsageError, match='F in float: expected top-1 of at'),
    ):
        TeacherCheckHook().before_train(runner)
    assert any(
        m.startswith('BlockReplacement: the teacher, CIFARResNet, as F in')
        for m in messages
    )


# --- what is refused ---------------------------------------------------------


class Around(nn.Module):
    """Something leads around ``second``."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(256, 10)

    def forward(self, x):
        x = self.first(x)
        return self.fc((x + self.second(x)).flatten(1))


class Two(nn.Module):
    """Returns two tensors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        x = self.conv(x)
        return x, x.relu()


class Pairs(nn.Module):
    """Its first block returns two tensors."""

    def __init__(self):
        super().__init__()
        self.first = Two()
        self.fc = nn.Linear(256, 10)

    def forward(self, x):
        return self.fc(sum(self.first(x)).flatten(1))


@pytest.mark.parametrize(
    'net, tap, message',
    [
        (Around, 'second', 'is all that later ones get, got backbone.second'),
        (Pairs, 'first', 'that return one tensor, .* got backbone.first:0'),
    ],
)
def test_networks_that_do_not_fit(net, tap, message):
    with pytest.raises(UsageError, match=message) as error:
        prepare(net(), (1, 8, 8), guidance=dict(BWR, taps=[tap]))
    assert '\n' not in str(error.value)


def test_what_leads_around_no_tap_is_taken():
    joint = prepare(Around(), (1, 8, 8), guidance=dict(BWR, taps=['first']))
    images, _ = batch()
    assert joint.losses(images, torch.arange(8))['guidance.loss_replaced'] > 0


def bad(message, **settings):
    return pytest.param(settings, message, id=message[:40])


@pytest.mark.parametrize(
    'settings, message',
    [
        bad('guidance.taps: expected blocks to replace, got None', taps=None),
        bad("got 'backbone.layer9', which matches nothing",
            taps='backbone.layer9'),
        bad('all that later ones get, got backbone.layer1.0.bn2, backbone',
            taps='backbone.layer*.*.bn2'),
        bad('expected the checkpoint of a frozen teacher',
            teacher=classifier()),
        bad('the architecture of F .CIFARResNet., whose blocks it takes, got '
            'a CIFARResNet that differs in layer1.1.conv1.weight',
            teacher=MMPRETRAIN_MODELS.build(classifier(depth=14))),
        bad('a CIFARResNet that differs in conv1.weight',
            teacher=MMPRETRAIN_MODELS.build(classifier(base_channels=8))),
        bad('none.pth does not exist', checkpoint='none.pth'),
        bad('expected a dict with `type`', logits=dict(tau=2)),
        bad('expected a loss that compares logits .N, 10.',
            logits=dict(type='mmrazor.FBKDLoss')),
        bad('guidance.loss_weight: .* got -1', loss_weight=-1),
        bad("guidance.dtype: .* got 'half'", dtype='half'),
    ],
)  # fmt: skip
def test_refused_in_one_line(settings, message):
    compat.enable()  # as the commands do
    with pytest.raises(UsageError, match=message) as error:
        joint_qat(guidance=dict(BWR, **settings))
    assert '\n' not in str(error.value)


def test_the_same_weights_with_other_strides():
    """All names and shapes agree, but not what the blocks return."""
    teacher = MMPRETRAIN_MODELS.build(classifier())
    block = teacher.backbone.layer2[0]
    block.conv1.stride = block.downsample[0].stride = (1, 1)
    message = 'same shape in F and in the teacher, got backbone.layer2.0 with'
    with pytest.raises(UsageError, match=message):
        joint_qat(guidance=dict(BWR, teacher=teacher))
