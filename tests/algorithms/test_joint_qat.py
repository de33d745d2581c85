import copy

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import EMAHook
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

from mmauxq.algorithms import JointQAT
from mmauxq.backbones import CIFARResNet
from mmauxq.errors import UsageError
from mmauxq.quantizers import named_quantizers
from tests.networks import (
    AUX,
    QUANTIZERS,
    SHAPE,
    batch,
    captured,
    classifier,
    joint_qat,
)

assert EMAHook  # the hook that ExponentialMovingAverage serves


def first_weight(model):
    return model.architecture.backbone.layer1[0].conv1.weight


def quantized_layers(model):
    return [
        name
        for name, module in model.architecture.named_modules()
        if hasattr(module, 'weight_quantizer')
    ]


def test_losses_have_the_names_of_the_contract():
    losses = joint_qat().loss(*batch())
    assert set(losses) == {'student.loss', 'guidance.loss_aux'}


def test_the_sum_is_what_is_optimised():
    model = joint_qat()
    losses = model.loss(*batch())
    total, logged = model.parse_losses(losses)
    torch.testing.assert_close(
        total, losses['student.loss'] + losses['guidance.loss_aux']
    )
    assert set(logged) == {'loss', *losses}


def test_both_losses_reach_the_shared_weights_in_one_backward():
    model = joint_qat()
    losses = model.loss(*batch())
    single = [
        torch.autograd.grad(loss, first_weight(model), retain_graph=True)[0]
        for loss in losses.values()
    ]
    assert all(gradient.abs().sum() > 0 for gradient in single)
    sum(losses.values()).backward()
    torch.testing.assert_close(first_weight(model).grad, sum(single))


def test_every_parameter_gets_a_gradient():
    """Hence DDP needs no search for unused parameters."""
    model = joint_qat()
    sum(model.loss(*batch()).values()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize('mode', ['predict', 'tensor'])
def test_guidance_is_not_called_outside_training(mode):
    model = joint_qat()
    model.loss(*batch())
    model.eval()
    calls = []
    model.guidance.register_forward_pre_hook(lambda *a: calls.append(a))
    model(*batch(), mode=mode)
    assert calls == []


def test_guidance_leaves_the_network_alone():
    """Same logits with it, without it, and from F by itself, to the bit."""
    guided = joint_qat()
    guided.loss(*batch())
    plain = joint_qat(guidance=None)
    plain.load_state_dict(guided.state_dict())
    guided.eval()
    plain.eval()
    inputs, _ = batch(seed=3)
    logits = guided(inputs, mode='tensor')
    assert torch.equal(logits, plain(inputs, mode='tensor'))
    assert torch.equal(logits, plain.architecture(inputs, mode='tensor'))
    assert set(plain.state_dict()) == {
        k for k in guided.state_dict() if not k.startswith('guidance.')
    }


def test_policy_default_first_and_classifier_float():
    layers = quantized_layers(joint_qat())
    assert 'backbone.conv1' not in layers and 'head.fc' not in layers
    # 3 stages of 2 convolutions, 2 of them with a shortcut
    assert len(layers) == 3 * 2 + 2


def test_policy_by_name():
    model = joint_qat(
        policy=dict(
            first=8, layers={'backbone.layer3.*': dict(weight=4), '*fc': 8}
        )
    )
    layers = dict(model.architecture.named_modules())
    assert layers['backbone.conv1'].weight_quantizer.bits == 8
    assert layers['backbone.layer3.0.conv1'].weight_quantizer.bits == 4
    assert layers['backbone.layer3.0.conv1'].input_quantizer.bits == 2
    assert layers['head.fc'].weight_quantizer.bits == 8


def test_scales_come_from_the_first_batch_and_only_from_it():
    model = joint_qat()
    scales = dict(named_quantizers(model))
    assert not any(q.calibrated for q in scales.values())
    model.loss(*batch())
    before = {n: q.step.clone() for n, q in scales.items()}
    assert all(q.calibrated for q in scales.values())
    model.loss(batch(seed=9)[0] * 5, batch()[1])
    assert all(torch.equal(q.step, before[n]) for n, q in scales.items())


def test_the_first_step_moves_batch_norm_once():
    model = joint_qat()
    model.loss(*batch())
    norm = model.architecture.backbone.layer1[0].bn1
    assert norm.num_batches_tracked == 1


def test_evaluation_before_calibration_is_refused():
    model = joint_qat().eval()
    with pytest.raises(UsageError, match='never calibrated'):
        model(*batch(), mode='predict')


def test_low_bits_without_a_float_start_warn(caplog):
    with captured() as messages:
        joint_qat().loss(*batch())
    assert any('WITHOUT A FLOAT CHECKPOINT' in m for m in messages)


def test_a_float_checkpoint_loads_by_the_same_names(tmp_path):
    torch.manual_seed(5)
    network = MODELS.build(classifier())
    file = tmp_path / 'float.pth'
    torch.save(dict(meta={}, state_dict=network.state_dict()), file)
    model = joint_qat(float_checkpoint=str(file))
    mine = model.architecture.state_dict()
    for key, value in network.state_dict().items():
        assert torch.equal(mine[key], value), key
    with captured() as messages:
        model.loss(*batch())
    assert not any('WITHOUT' in m for m in messages)


def test_another_number_of_classes_keeps_the_new_head(tmp_path):
    config = classifier()
    config['head']['num_classes'] = 7
    network = MODELS.build(config)
    file = tmp_path / 'float.pth'
    torch.save(network.state_dict(), file)
    with captured() as messages:
        model = joint_qat(float_checkpoint=str(file))
    assert torch.equal(
        first_weight(model), network.backbone.layer1[0].conv1.weight
    )
    assert any('head.fc.weight' in m and 'random' in m for m in messages)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    other = MODELS.build(classifier(depth=14))
    file = tmp_path / 'float.pth'
    torch.save(MODELS.build(classifier(base_channels=8)).state_dict(), file)
    with pytest.raises(UsageError, match='expected a checkpoint of this arch'):
        joint_qat(float_checkpoint=str(file))
    model = joint_qat(architecture=classifier(depth=14))
    small = joint_qat()
    with pytest.raises(UsageError, match='is missing, and .* more'):
        model.load_state_dict(small.state_dict())
    model.load_state_dict(
        {f'architecture.{k}': v for k, v in other.state_dict().items()},
        strict=False,
    )


def test_the_runner_hands_its_preprocessor_to_the_architecture():
    config = classifier()
    del config['data_preprocessor']
    model = joint_qat(
        architecture=config,
        data_preprocessor=dict(num_classes=10, mean=[3.0], std=[2.0]),
    )
    assert model.data_preprocessor is model.architecture.data_preprocessor
    assert model.data_preprocessor.mean.item() == 3


@pytest.mark.parametrize(
    'dtype, wanted', [(None, torch.bfloat16), ('float32', torch.float32)]
)
def test_amp_keeps_the_scales_in_float32(dtype, wanted):
    """And the module, if it is told to."""
    model = joint_qat(
        guidance=dict(type='mmauxq.AuxAdaptorAggregator', dtype=dtype)
    )
    seen = {}
    model.guidance.adaptors[1].phi[0].register_forward_hook(
        lambda m, a, out: seen.update(aux=out.dtype)
    )
    model.architecture.backbone.layer1[0].conv2.register_forward_hook(
        lambda m, a, out: seen.update(student=out.dtype)
    )
    with torch.autocast('cpu', torch.bfloat16):
        losses = model.loss(*batch())
    sum(losses.values()).backward()
    assert seen == dict(aux=wanted, student=torch.bfloat16)
    assert all(
        q.step.grad.dtype == torch.float32 for _, q in named_quantizers(model)
    )
    assert AmpOptimWrapper  # the wrapper whose context this is


def test_gradient_accumulation_equals_one_large_step():
    """Two half batches accumulated, batch norm in evaluation mode."""

    def trained(parts):
        model = joint_qat()
        model.loss(*batch())  # calibrates, on the same data for both
        model.eval()
        wrapper = OptimWrapper(
            torch.optim.SGD(model.parameters(), 0.1),
            accumulative_counts=parts,
        )
        wrapper.initialize_count_status(model, 0, parts)
        inputs, samples = batch()
        size = len(samples) // parts
        for i in range(parts):
            part = slice(i * size, (i + 1) * size)
            losses = model.loss(inputs[part], samples[part])
            with wrapper.optim_context(model):
                wrapper.update_params(sum(losses.values()))
        return first_weight(model)

    torch.testing.assert_close(trained(2), trained(1))


def test_gradient_clipping_covers_network_and_module():
    model = joint_qat()
    wrapper = OptimWrapper(
        torch.optim.SGD(model.parameters(), 0.1),
        clip_grad=dict(max_norm=1e-3),
    )
    before = copy.deepcopy(model.state_dict())
    wrapper.update_params(sum(model.loss(*batch()).values()))
    moved = sum(
        (p.detach() - before[n]).square().sum()
        for n, p in model.named_parameters()
        if 'step' not in n
    )
    # scales were calibrated in between, everything else moved by lr * norm
    assert 0 < moved.sqrt() <= 1.001e-4


def test_an_average_of_the_weights_follows_the_scales():
    model = joint_qat()
    average = ExponentialMovingAverage(model, momentum=0.5)
    model.loss(*batch())
    average.update_parameters(model)
    for (name, mine), (_, its) in zip(
        named_quantizers(model), named_quantizers(average.module), strict=True
    ):
        assert its.calibrated, name
        assert torch.equal(mine.step, its.step)
    average.module.eval()
    model.eval()
    inputs, _ = batch(seed=2)
    torch.testing.assert_close(
        average.module(inputs, mode='tensor'), model(inputs, mode='tensor')
    )


@pytest.mark.parametrize(
    'settings, message',
    [
        (
            dict(
                architecture=dict(
                    type='LinearClsHead', num_classes=2, in_channels=4
                )
            ),
            'without backbone and head',
        ),
        (
            dict(guidance=dict(type='mmauxq.Nothing')),
            'guidance.type: expected',
        ),
        (
            dict(guidance=dict(AUX, taps='backbone.layer7.*')),
            "'backbone.layer7.*', which matches nothing",
        ),
        (dict(policy=dict(layers={'nothing.*': 8})), 'policy.layers'),
        (
            dict(policy=dict(frist=8)),
            'model.policy: expected one of first, .*did you mean first',
        ),
        (dict(policy=dict(first=9)), 'policy.first: .* got bits=9'),
        (
            dict(
                quantizers=dict(
                    QUANTIZERS, weight=dict(type='mmauxq.LSQ', bits=9)
                )
            ),
            'quantizers.weight: .* got bits=9',
        ),
        (
            dict(
                quantizers=dict(
                    QUANTIZERS, weight=dict(type='mmauxq.LSQ', bits=1)
                )
            ),
            'LSQ.*bits=1',
        ),
        (
            dict(quantizers=dict(weight=dict(bits=2))),
            "model.quantizers: expected 'weight' and 'activation'",
        ),
        (
            dict(quantizers=dict(QUANTIZERS, weight=dict(type='mmauxq.LSQ'))),
            'model.quantizers.weight: .* has no `bits`',
        ),
        (
            dict(
                quantizers=dict(QUANTIZERS, weight=dict(type='ReLU', bits=2))
            ),
            "got 'ReLU'",
        ),
        (
            dict(
                quantizers=dict(
                    QUANTIZERS,
                    weight=dict(type='mmauxq.DoReFaActivation', bits=4),
                )
            ),
            "expected a role out of .*, got 'weight'",
        ),
        (dict(input_shape=(8, 8)), 'model.input_shape: expected three'),
        (dict(input_shape=(3, 8, 8)), 'forward pass on'),
    ],
)
def test_bad_configs_in_one_line(settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        joint_qat(**settings)
    assert '\n' not in str(caught.value)


def test_a_network_without_a_head_is_refused():
    config = classifier()
    config['head'] = None
    with pytest.raises(UsageError, match='got a ImageClassifier without head'):
        joint_qat(architecture=config)


def test_building_draws_no_random_numbers(monkeypatch):
    """Also of a network that seeds by the clock, as RevViT does."""
    forward = CIFARResNet.forward
    monkeypatch.setattr(
        CIFARResNet, 'forward', lambda *x: (torch.seed(), forward(*x))[1]
    )
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(joint_qat().state_dict())
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name


def test_the_cost_is_printed():
    with captured() as messages:
        model = joint_qat()
    text = '\n'.join(messages)
    assert 'JointQAT: F has' in text
    assert 'AuxAdaptorAggregator has' in text and 'in training only' in text
    assert 'taps stem, backbone.layer1.0' in text
    assert '8 layers at W2A2; 2 float: backbone.conv1 (first layer)' in text
    assert model.training


def test_built_from_the_registry_with_scopes():
    config = ConfigDict(
        type='mmauxq.JointQAT',
        _scope_='mmauxq',
        architecture=classifier(),
        quantizers=QUANTIZERS,
        guidance=AUX,
        input_shape=SHAPE,
    )
    assert isinstance(MODELS.build(config), JointQAT)


def test_label_smoothing_and_mixup_reach_both_heads():
    config = classifier()
    config['head']['loss'] = dict(
        type='LabelSmoothLoss',
        label_smooth_val=0.1,
        num_classes=10,
        mode='original',
    )
    config['train_cfg'] = dict(augments=dict(type='Mixup', alpha=0.8))
    model = joint_qat(architecture=config)
    data = model.data_preprocessor(
        dict(
            inputs=list(batch()[0]),
            data_samples=[DataSample().set_gt_label(1) for _ in range(8)],
        ),
        True,
    )
    assert 'gt_score' in data['data_samples'][0]
    losses = model(**data, mode='loss')
    assert all(torch.isfinite(loss) for loss in losses.values())


# --- several guidances -----------------------------------------------------

KD = dict(type='mmauxq.KnowledgeDistillation')
DSN = dict(type='mmauxq.IntermediateClassifiers')
BWR = dict(type='mmauxq.BlockReplacement')


def test_several_guidances_have_names_and_weights_of_their_own():
    """Two of one kind, too: each term is that of the guidance alone."""
    configs = [
        dict(DSN, taps='backbone.layer1.0', loss_weight=0.5),
        dict(DSN, taps='backbone.layer1.0', loss_weight=2.0),
        KD,
    ]
    model = joint_qat(guidance=configs)
    model.loss(*batch())
    state = copy.deepcopy(model.state_dict())
    losses = model.loss(*batch())
    expected = {}
    for i, config in enumerate(configs):
        alone = joint_qat(guidance=config, seed=i)
        alone.load_state_dict(
            {
                name.replace(f'guidance.{i}.', 'guidance.'): value
                for name, value in state.items()
                if not name.startswith('guidance.')
                or name.startswith(f'guidance.{i}.')
            }
        )
        for name, value in alone.loss(*batch()).items():
            expected[name.replace('guidance', f'guidance.{i}')] = value
    assert set(losses) == set(expected)
    assert 'guidance.1.loss_layer1.0' in losses
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def test_all_of_several_guidances_are_dropped():
    guided = joint_qat(guidance=[AUX, KD, DSN])
    guided.loss(*batch())
    plain = joint_qat(guidance=None)
    found = plain.load_state_dict(guided.state_dict())
    assert not found.missing_keys and not found.unexpected_keys
    inputs, _ = batch(seed=3)
    assert torch.equal(
        guided.eval()(inputs, mode='tensor'),
        plain.eval()(inputs, mode='tensor'),
    )


def test_the_cost_of_each_guidance_is_printed():
    with captured() as messages:
        joint_qat(guidance=[AUX, KD, DSN])
    said = [m for m in messages if 'in training only' in m]
    assert [m.split()[1] for m in said] == [
        'AuxAdaptorAggregator',
        'KnowledgeDistillation',
        'IntermediateClassifiers',
    ]
    assert '+100.0%' in said[1]  # F in float


@pytest.mark.parametrize(
    'guidance, message',
    [
        (
            [AUX, 7],
            'expected a dict with `type`, a list of such dicts, or None',
        ),
        (7, 'model.guidance: expected a dict .*got 7'),
        ([dict(AUX, taps=3)], 'guidance.taps: expected .*got 3'),
    ],
)
def test_what_is_no_list_of_guidances(guidance, message):
    with pytest.raises(UsageError, match=message):
        joint_qat(guidance=guidance)


def test_two_auxiliary_modules_are_refused():
    with pytest.raises(UsageError, match='one auxiliary module, got 2'):
        joint_qat(guidance=[AUX, AUX])


def test_several_guidances_are_averaged_with_the_network():
    model = joint_qat(guidance=[AUX, KD])
    average = ExponentialMovingAverage(model, momentum=0.5)
    model.loss(*batch())
    average.update_parameters(model)
    assert set(average.module.state_dict()) == set(model.state_dict())


def test_a_head_without_logits_cannot_be_distilled(monkeypatch):
    model = joint_qat(guidance=KD)
    head = model.architecture.head
    monkeypatch.setattr(
        type(head),
        'loss',
        lambda self, features, samples: dict(loss=features[0].sum()),
    )
    with pytest.raises(UsageError, match='a head of F that gives logits'):
        model.loss(*batch())


# --- compiled steps --------------------------------------------------------

QUANTIZED_BY = dict(
    LSQ=QUANTIZERS,
    LSQPlus=dict(
        weight=dict(type='mmauxq.LSQ', bits=3),
        activation=dict(type='mmauxq.LSQPlus', bits=3),
    ),
    PACT=dict(
        weight=dict(type='mmauxq.DoReFaWeight', bits=4),
        activation=dict(type='mmauxq.PACTActivation', bits=4),
    ),
)
FEATURES = dict(
    KD,
    features=dict(type='mmrazor.ATLoss', loss_weight=100.0),
    connector=dict(type='mmrazor.ConvModuleConnector'),
)


@pytest.mark.parametrize(
    'guidance, quantizers',
    [
        (DSN, 'LSQPlus'),
        (FEATURES, 'PACT'),
        ([dict(AUX, width_ratio=0.5), KD], 'LSQ'),
        (dict(AUX, separate_bn=True), 'LSQ'),
        (BWR, 'LSQ'),
    ],
)
def test_a_compiled_step_is_the_same(guidance, quantizers):
    """One graph, compiled once, equal losses and weights; see ``compile``."""
    from torch._dynamo.utils import counters

    def trained(compile):
        model = joint_qat(
            guidance=guidance,
            quantizers=QUANTIZED_BY[quantizers],
            compile=compile,
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        found = []
        for step in range(4):
            losses = model.loss(*batch(seed=step))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            found.append({k: v.item() for k, v in losses.items()})
            if step == 2:  # a validation in between
                model.eval()(*batch(seed=9), mode='predict')
                model.train()
        return found, model.state_dict()

    eager, weights = trained(None)
    counters.clear()
    compiled, other = trained(dict(backend='aot_eager', fullgraph=True))
    assert counters['stats']['unique_graphs'] == 1
    for mine, its in zip(eager, compiled, strict=True):
        assert mine == pytest.approx(its, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)


def test_a_head_with_a_loss_of_its_own_is_not_compiled(monkeypatch):
    config = classifier()
    config['head'] = dict(type='ArcFaceClsHead', num_classes=10,
                          in_channels=16)  # fmt: skip
    with pytest.raises(UsageError, match='compile: .* got a ArcFaceClsHead'):
        joint_qat(architecture=config, guidance=None, compile=True)


def test_unknown_options_of_the_compiler():
    with pytest.raises(UsageError, match='speed.compile: .*mode.*fast'):
        joint_qat(compile=dict(mode='fast'))
