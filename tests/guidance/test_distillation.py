import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.runner.checkpoint import get_state_dict
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from mmrazor.registry import MODELS as MMRAZOR_MODELS

from mmauxq import compat
from mmauxq.errors import UsageError
from mmauxq.guidance.distance import build_distance
from mmauxq.guidance.teacher import build_network, crop_size
from tests.networks import AUX, SHAPE, batch, classifier, joint_qat

KD = dict(type='mmauxq.KnowledgeDistillation')
KL = dict(type='mmrazor.KLDivergence')
AT = dict(type='mmrazor.ATLoss', loss_weight=100.0)
CONNECTOR = dict(type='mmrazor.ConvModuleConnector', act_cfg=None)


def with_head(**head):
    config = classifier()
    config['head'].update(head)
    return config


@pytest.fixture
def teacher(tmp_path):
    """(config, checkpoint, network) of a wider and deeper network."""
    config = classifier(depth=14, base_channels=8)
    torch.manual_seed(7)
    network = MMPRETRAIN_MODELS.build(config)
    network.init_weights()
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand_like(buffer))
    file = tmp_path / 'teacher.pth'
    torch.save(dict(meta={}, state_dict=network.state_dict()), file)
    return config, str(file), network.eval()


def logits_of(model, inputs):
    """Of F in training, without a trace."""
    network = copy.deepcopy(model.architecture).train()
    return network(inputs, mode='tensor')


def kl(student, teacher, tau=1.0):
    """Hinton et al., section 2: with the factor tau**2 on the gradients."""
    p = F.softmax(teacher / tau, 1)
    return (
        tau**2
        * (p * (p.log() - F.log_softmax(student / tau, 1))).sum(1).mean()
    )


@pytest.mark.parametrize('tau', [1.0, 4.0])
def test_the_loss_is_the_divergence_of_the_logits(teacher, tau):
    config, file, network = teacher
    model = joint_qat(
        guidance=dict(
            KD,
            teacher=config,
            checkpoint=file,
            logits=dict(KL, tau=tau),
            loss_weight=0.5,
        )
    )
    inputs, samples = batch()
    model.loss(inputs, samples)
    student = logits_of(model, inputs)
    with torch.no_grad():
        expected = 0.5 * kl(student, network(inputs, mode='tensor'), tau)
    losses = model.loss(inputs, samples)
    assert set(losses) == {'student.loss', 'guidance.loss_logits'}
    torch.testing.assert_close(losses['guidance.loss_logits'], expected)


def test_the_gradient_is_that_of_the_divergence(teacher):
    """(softmax(student) - softmax(teacher)) / N, at temperature 1."""
    config, file, network = teacher
    model = joint_qat(
        guidance=dict(KD, teacher=config, checkpoint=file)
    ).guidance
    inputs, samples = batch()
    student = torch.randn(8, 10, requires_grad=True)
    found = model(dict(image=inputs))
    loss = model.losses(found, student, None, samples)['loss_logits']
    (gradient,) = torch.autograd.grad(loss, student)
    target = network(inputs, mode='tensor').softmax(1).detach()
    torch.testing.assert_close(
        gradient, (student.softmax(1).detach() - target) / 8
    )


def test_features_as_mmrazor_compares_them(teacher):
    """Its own distiller, with its own recorders, on the same networks."""
    config, file, network = teacher
    places = ['backbone.layer1', 'backbone.layer3']
    model = joint_qat(
        guidance=dict(
            KD,
            teacher=config,
            checkpoint=file,
            taps=places,
            features=AT,
            betas=[1.0, 3.0],
            logits=None,
        )
    )
    inputs, samples = batch()
    model.loss(inputs, samples)
    theirs = MMRAZOR_MODELS.get('mmrazor.ConfigurableDistiller')(
        student_recorders={
            p: dict(type='mmrazor.ModuleOutputs', source=p) for p in places
        },
        teacher_recorders={
            p: dict(type='mmrazor.ModuleOutputs', source=p) for p in places
        },
        distill_losses={f'loss_{p[9:]}': dict(AT) for p in places},
        loss_forward_mappings={
            f'loss_{p[9:]}': dict(
                s_feature=dict(from_student=True, recorder=p),
                t_feature=dict(from_student=False, recorder=p),
            )
            for p in places
        },
    )
    student = copy.deepcopy(model.architecture).train()
    theirs.prepare_from_student(student)
    theirs.prepare_from_teacher(network)
    with theirs.student_recorders, theirs.teacher_recorders:
        student(inputs, mode='tensor')
        network(inputs, mode='tensor')
    expected = theirs.compute_distill_losses()
    losses = model.loss(inputs, samples)
    for name, beta in (('loss_layer1', 1.0), ('loss_layer3', 3.0)):
        assert expected[name] > 0
        torch.testing.assert_close(
            losses[f'guidance.{name}'], beta * expected[name]
        )


def test_a_connector_leads_to_another_width(teacher):
    """FitNet: the distance of a regression of the features."""
    config, file, network = teacher
    model = joint_qat(
        guidance=dict(
            KD,
            teacher=config,
            checkpoint=file,
            taps='backbone.layer2',
            features=dict(
                type='mmrazor.L2Loss', normalize=False, div_element=True
            ),
            connector=CONNECTOR,
        )
    )
    inputs, samples = batch()
    losses = model.loss(inputs, samples)
    losses['guidance.loss_layer2'].backward()
    conv = model.guidance.connectors[0].conv_module.conv
    assert conv.weight.shape == (16, 8, 1, 1)
    assert conv.weight.grad.abs().sum() > 0
    backbone = model.architecture.backbone
    assert backbone.layer1[0].conv1.weight.grad.abs().sum() > 0
    assert backbone.layer3[0].conv1.weight.grad is None

    student = copy.deepcopy(model.architecture).train()
    seen = {}
    student.backbone.layer2.register_forward_hook(
        lambda m, a, out: seen.update(mine=out.clone())
    )
    network.backbone.layer2.register_forward_hook(
        lambda m, a, out: seen.update(its=out.clone())
    )
    student(inputs, mode='tensor')
    network(inputs, mode='tensor')
    expected = F.mse_loss(
        F.conv2d(seen['mine'], conv.weight, conv.bias), seen['its']
    )
    torch.testing.assert_close(
        model.loss(inputs, samples)['guidance.loss_layer2'], expected
    )


# --- whose weights ---------------------------------------------------------


def test_without_a_config_the_teacher_is_f_in_float():
    """With the weights that F starts from, and keeps."""
    model = joint_qat(guidance=KD)
    start = copy.deepcopy(model.architecture.state_dict())
    inputs, samples = batch()
    for _ in range(2):
        losses = model.loss(inputs, samples)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        sum(losses.values()).backward()
        optimizer.step()
    network = MMPRETRAIN_MODELS.build(classifier()).eval()
    network.load_state_dict(
        {k: v for k, v in start.items() if 'quantizer' not in k}
    )
    expected = network(inputs, mode='tensor')
    torch.testing.assert_close(model.guidance.teacher(inputs)[0], expected)


def test_a_float_checkpoint_serves_both(tmp_path):
    torch.manual_seed(5)
    network = MMPRETRAIN_MODELS.build(classifier()).eval()
    file = tmp_path / 'float.pth'
    torch.save(network.state_dict(), file)
    model = joint_qat(guidance=KD, float_checkpoint=str(file))
    model.prepare()
    inputs, _ = batch()
    torch.testing.assert_close(
        model.guidance.teacher(inputs)[0], network(inputs, mode='tensor')
    )


def test_an_initialisation_leaves_a_frozen_teacher_alone(teacher):
    config, file, network = teacher
    model = joint_qat(
        guidance=dict(KD, teacher=config, checkpoint=file),
        init_cfg=dict(type='Constant', layer='Conv2d', val=0.5),
    )
    found = model.guidance.teacher.network.state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(found[name], value), name


def test_a_frozen_teacher_is_stored_and_not_trained(teacher, tmp_path):
    config, file, network = teacher
    settings = dict(KD, teacher=config, checkpoint=file)
    model = joint_qat(guidance=settings)
    model.train()
    assert not model.guidance.teacher.network.training
    assert not any(
        p.requires_grad for p in model.guidance.teacher.parameters()
    )
    inputs, samples = batch()
    sum(model.loss(inputs, samples).values()).backward()
    state = get_state_dict(model)  # what MMEngine saves
    assert set(state) == set(model.state_dict())
    for key, value in network.state_dict().items():
        assert torch.equal(state[f'guidance.teacher.network.{key}'], value), (
            key
        )
    # its file may be another one when training is resumed
    other = MMPRETRAIN_MODELS.build(config)
    torch.save(other.state_dict(), file)
    resumed = joint_qat(guidance=settings, seed=3)
    found = resumed.load_state_dict(state)
    assert not found.missing_keys and not found.unexpected_keys
    torch.testing.assert_close(
        resumed.guidance.teacher(inputs)[0], network(inputs, mode='tensor')
    )


def test_the_resumed_teacher_is_not_what_f_has_become():
    model = joint_qat(guidance=KD)
    model.loss(*batch())
    inputs, _ = batch()
    before = model.guidance.teacher(inputs)[0]
    with torch.no_grad():
        for parameter in model.architecture.parameters():
            parameter.mul_(0.5)
    resumed = joint_qat(guidance=KD, seed=3)
    resumed.load_state_dict(model.state_dict())
    resumed.loss(*batch())
    torch.testing.assert_close(resumed.guidance.teacher(inputs)[0], before)


def test_a_teacher_trained_along_has_its_own_task_loss(teacher):
    config, _, _ = teacher
    model = joint_qat(
        guidance=dict(KD, teacher=config, train_teacher=True, loss_weight=0.0)
    )
    inputs, samples = batch()
    model.loss(inputs, samples)
    its = copy.deepcopy(model.guidance.teacher.network)
    losses = model.loss(inputs, samples)
    expected = its.head.loss(its.extract_feat(inputs), samples)['loss']
    torch.testing.assert_close(losses['guidance.loss_teacher'], expected)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.guidance.teacher.network.training


def test_the_divergence_does_not_train_the_teacher(teacher):
    config, file, _ = teacher
    model = joint_qat(
        guidance=dict(KD, teacher=config, checkpoint=file, train_teacher=True)
    )
    losses = model.loss(*batch())
    losses['guidance.loss_logits'].backward()
    network = model.guidance.teacher.network
    assert all(p.grad is None for p in network.parameters())


# --- what it is fed with ---------------------------------------------------


def test_a_teacher_with_another_normalisation(tmp_path):
    """Sees the same raw images, colours in the order it knows."""

    def coloured(**preprocessor):
        config = classifier(in_channels=3)
        config['data_preprocessor'] = dict(num_classes=10, **preprocessor)
        return config

    ours = coloured(
        mean=[100.0, 110.0, 120.0], std=[50.0, 60.0, 70.0], to_rgb=True
    )
    theirs = coloured(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])
    network = MMPRETRAIN_MODELS.build(theirs).eval()
    file = tmp_path / 'teacher.pth'
    torch.save(network.state_dict(), file)
    model = joint_qat(
        architecture=ours,
        input_shape=(3, 8, 8),
        guidance=dict(KD, teacher=theirs, checkpoint=str(file)),
    )
    raw = torch.randint(256, (4, 3, 8, 8)).float()
    expected = network(
        network.data_preprocessor(dict(inputs=raw))['inputs'], mode='tensor'
    )
    found, _ = model.guidance.teacher(
        model.data_preprocessor(dict(inputs=raw))['inputs']
    )
    torch.testing.assert_close(found, expected)


# --- with the auxiliary module ---------------------------------------------


def test_the_teacher_guides_the_auxiliary_classifier(teacher):
    config, file, network = teacher
    kd = dict(KD, teacher=config, checkpoint=file, logits=None, guides_aux=KL)
    model = joint_qat(guidance=[kd, AUX])
    inputs, samples = batch()
    seen = []
    model.guidance[1].register_forward_hook(lambda m, a, out: seen.append(out))
    losses = model.loss(inputs, samples)
    assert set(losses) == {
        'student.loss',
        'guidance.0.loss_to_aux',
        'guidance.1.loss_aux',
    }
    torch.testing.assert_close(
        losses['guidance.0.loss_to_aux'],
        kl(seen[0], network(inputs, mode='tensor')),
    )
    losses['guidance.0.loss_to_aux'].backward()
    assert model.guidance[1].head.fc.weight.grad.abs().sum() > 0
    assert model.architecture.head.fc.weight.grad is None


@pytest.mark.parametrize('detach', [True, False])
def test_the_auxiliary_classifier_guides_f(detach):
    distance = KL if detach else dict(KL, teacher_detach=False)
    model = joint_qat(
        guidance=dict(AUX, guides_student=distance, loss_weight=0.5)
    )
    inputs, samples = batch()
    model.loss(inputs, samples)
    seen = []
    model.guidance.register_forward_hook(lambda m, a, out: seen.append(out))
    student = logits_of(model, inputs)
    losses = model.loss(inputs, samples)
    torch.testing.assert_close(
        losses['guidance.loss_to_student'], 0.5 * kl(student, seen[0])
    )
    losses['guidance.loss_to_student'].backward()
    assert model.architecture.head.fc.weight.grad.abs().sum() > 0
    assert (model.guidance.head.fc.weight.grad is None) == detach


# --- mixed precision -------------------------------------------------------


@pytest.mark.parametrize(
    'dtype, wanted', [(None, torch.bfloat16), ('float32', torch.float32)]
)
def test_distances_are_float32_under_autocast(teacher, dtype, wanted):
    config, file, _ = teacher
    model = joint_qat(
        guidance=dict(
            KD,
            teacher=config,
            checkpoint=file,
            features=AT,
            connector=CONNECTOR,
            dtype=dtype,
        )
    )
    seen, compared = set(), set()
    model.guidance.connectors[0].register_forward_hook(
        lambda m, a, out: seen.add(out.dtype)
    )
    model.guidance.features.register_forward_hook(
        lambda m, args, out: compared.update(
            (x.dtype, torch.is_autocast_enabled('cpu')) for x in (*args, out)
        )
    )
    with torch.autocast('cpu', torch.bfloat16):
        losses = model.loss(*batch())
    assert seen == {wanted}
    assert compared == {(torch.float32, False)}
    assert all(
        value.dtype == torch.float32 and torch.isfinite(value)
        for name, value in losses.items()
        if name.startswith('guidance')
    )
    sum(losses.values()).backward()


# --- cost ------------------------------------------------------------------


def test_the_cost_counts_the_teacher(teacher):
    config, file, network = teacher
    model = joint_qat(guidance=dict(KD, teacher=config, checkpoint=file))
    assert model.cost.guidance_parameters == sum(
        p.numel() for p in network.parameters()
    )
    both = joint_qat(guidance=[dict(KD, teacher=config, checkpoint=file), AUX])
    aux = joint_qat()
    for what in ('guidance_parameters', 'guidance_multiply_adds'):
        assert getattr(both.cost, what) == getattr(model.cost, what) + getattr(
            aux.cost, what
        )


# --- the size of the teacher's images --------------------------------------


def _pipeline(*steps):
    return dict(dataset=dict(pipeline=list(steps)))


@pytest.mark.parametrize(
    'config, size',
    [
        ({}, None),
        (dict(test_dataloader=_pipeline(dict(type='PackInputs'))), None),
        (dict(val_dataloader=_pipeline(dict(crop_size=96))), 96),
        (
            dict(
                val_dataloader=_pipeline(dict(crop_size=96)),
                test_dataloader=_pipeline(
                    dict(scale=256), dict(crop_size=224)
                ),
            ),
            224,
        ),
        (dict(test_dataloader=_pipeline(dict(scale=(64, 48)))), 64),
        (dict(test_dataloader=_pipeline(dict(scale='large'))), None),
        (dict(test_dataloader=_pipeline(dict(scale=-1))), None),
    ],
)
def test_what_a_test_pipeline_says_of_the_size(config, size):
    assert crop_size(config) == size


def test_a_backbone_with_a_size_of_its_own():
    """It goes before what the pipeline says."""
    settings = dict(
        type='VisionTransformer', arch='deit-tiny', img_size=32, patch_size=16
    )
    head = dict(
        type='VisionTransformerClsHead', num_classes=5, in_channels=192
    )
    config = dict(
        model=dict(type='ImageClassifier', backbone=settings, head=head),
        test_dataloader=_pipeline(dict(crop_size=224)),
    )
    network, size = build_network(config)
    assert size == 32 and network.head.num_classes == 5


def test_a_distance_by_its_class():
    """As MMEngine's registries take it, too."""
    cls = MMRAZOR_MODELS.get('mmrazor.KLDivergence')
    distance = build_distance(dict(type=cls, tau=2), 'guidance.logits', 10)
    assert type(distance) is cls and distance.tau == 2


# --- what is refused -------------------------------------------------------


def bad(settings, message, **more):
    return pytest.param({**more, 'guidance': dict(KD, **settings)}, message)


OTHER = classifier(depth=14)


@pytest.mark.parametrize(
    'settings, message',
    [
        bad(
            dict(teacher=OTHER),
            'expected the checkpoint of a frozen teacher, got None',
        ),
        bad(dict(teacher='none.py'), 'teacher=none.py: does not exist'),
        bad(dict(teacher='mmpretrain::no/no.py'), 'cannot be read'),
        bad(
            dict(teacher=dict(type='Nope')),
            r'^guidance.teacher=dict\(...\): expected the config of an image',
        ),
        bad(
            dict(teacher='mmpretrain::_base_/datasets/cifar10_bs16.py'),
            '^guidance.teacher=mmpretrain::_base_/datasets/cifar10_bs16.py: '
            'expected the config of an image classifier',
        ),
        bad(
            dict(teacher=with_head(type='Nope'), train_teacher=True),
            'cannot be built',
        ),
        bad(
            dict(teacher=with_head(num_classes=7), train_teacher=True),
            'expected 10 classes, those of F, got 7',
        ),
        bad(
            dict(
                teacher=classifier(in_channels=3),
                train_teacher=True,
            ),
            'expected one that takes images .1, 8, 8., got an error',
        ),
        bad(
            dict(
                teacher=dict(model=OTHER, input_shape=(1, 28, 28)),
                train_teacher=True,
            ),
            'expected a teacher for images of 8 pixels, got one for 28',
        ),
        bad(
            dict(
                teacher='mmpretrain::resnet/resnet18_8xb32_in1k.py',
                train_teacher=True,
            ),
            'expected a teacher for images of 8 pixels, got one for 224',
        ),
        bad(dict(checkpoint='none.pth'), 'none.pth does not exist'),
        bad(dict(logits=None), 'compares nothing'),
        bad(dict(logits=dict(tau=2)), 'expected a dict with `type`'),
        bad(
            dict(logits=dict(type='mmrazor.No')),
            'expected a class registered in mmrazor',
        ),
        bad(dict(logits=dict(KL, tow=1)), "unexpected keyword argument 'tow'"),
        bad(
            dict(logits=dict(type='mmrazor.DKDLoss')),
            'which takes preds_S, preds_T, gt_labels',
        ),
        bad(
            dict(logits=dict(type='mmrazor.FBKDLoss')),
            'expected a loss that compares logits .N, 10.',
        ),
        bad(
            dict(taps='backbone.layer1'),
            'guidance.features: expected a distance',
        ),
        bad(
            dict(taps='backbone.layer9', features=AT),
            "got 'backbone.layer9', which matches nothing",
        ),
        bad(
            dict(features=AT, teacher_taps='backbone.layer9'),
            "got 'backbone.layer9', which matches nothing",
        ),
        bad(
            dict(features=AT, teacher_taps='backbone.layer1'),
            'expected 3 places, .* got 1 .backbone.layer1.',
        ),
        bad(
            dict(features=AT, betas=[1.0] * 4), 'expected 3 weights, .* got 4'
        ),
        bad(dict(features=AT, betas=-1), 'expected a number from 0 or a list'),
        bad(
            dict(
                features=AT,
                taps='backbone.layer1',
                teacher_taps='backbone.layer3',
            ),
            'ATLoss cannot compare',
        ),
        bad(
            dict(
                teacher=classifier(base_channels=8),
                train_teacher=True,
                features=dict(type='mmrazor.L2Loss'),
            ),
            'choose other taps, or set a connector',
        ),
        bad(dict(guides_aux=KL), 'expected an auxiliary module beside'),
        bad(dict(loss_weight=-1), 'guidance.loss_weight: .* got -1'),
        bad(dict(dtype='half'), "guidance.dtype: .* got 'half'"),
    ],
)
def test_refused_in_one_line(settings, message):
    compat.enable()  # as the commands do
    with pytest.raises(UsageError, match=message) as error:
        joint_qat(**settings)
    assert '\n' not in str(error.value)


def test_a_checkpoint_of_another_network(tmp_path, teacher):
    _, file, _ = teacher
    with pytest.raises(
        UsageError, match='checkpoint=.*: expected a checkpoint'
    ):
        joint_qat(guidance=dict(KD, checkpoint=file))


def test_a_checkpoint_that_would_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ('ran',)

    file = tmp_path / 'evil.pth'
    torch.save({'state_dict': {}, 'x': Evil()}, file)
    compat.enable()
    with pytest.raises(UsageError, match='is refused because'):
        joint_qat(guidance=dict(KD, checkpoint=str(file)))


def test_a_config_file_of_mmpretrain(tmp_path):
    """An ImageNet recipe whose images fit."""
    model = joint_qat(
        architecture=dict(
            type='ImageClassifier',
            backbone=dict(type='MobileNetV2', widen_factor=0.1),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(
                type='LinearClsHead', num_classes=1000, in_channels=1280
            ),
        ),
        input_shape=(3, 224, 224),
        guidance=dict(
            KD,
            teacher='mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py',
            train_teacher=True,
        ),
    )
    # mean and colours of that config
    assert not model.guidance.teacher.same_normalisation
    assert model.guidance.teacher.flip
    assert model.cost.shape == (3, 224, 224)
    assert SHAPE != model.cost.shape
