from functools import partial

import pytest
import torch
import torch.nn.functional as F
from mmpretrain.models.heads import LinearClsHead, MultiLabelLinearClsHead
from mmpretrain.structures import DataSample

from mmauxq.algorithms.head_loss import task_loss
from mmauxq.errors import UsageError
from mmauxq.guidance import AuxAdaptorAggregator, Tap
from tests.networks import AUX, batch, classifier, joint_qat

TAPS = [
    Tap('stem', (4, 8, 8)),
    Tap('a', (4, 8, 8)),
    Tap('b', (8, 4, 4)),
]


def head(**loss):
    return LinearClsHead(10, 8, loss=dict(type='CrossEntropyLoss', **loss))


def task(samples, of=None):
    return partial(task_loss, of or head(), samples)


def outputs(count=3, taps=TAPS):
    torch.manual_seed(1)
    return {
        t.name: torch.randn(count, *t.shape, requires_grad=True) for t in taps
    }


def loss_of(module, given, samples, of=None):
    output = module(given)
    return module.losses(output, None, None, task(samples, of))['loss_aux']


def test_the_recursion_of_the_paper():
    module = AuxAdaptorAggregator(TAPS, 10).eval()
    given = outputs()
    g = module.adaptors[0].phi(given['stem'])
    g = F.relu(module.adaptors[1].phi(given['a']) + g)
    g = F.relu(
        module.adaptors[2].phi(given['b']) + module.adaptors[2].project(g)
    )
    expected = module.head.fc(g.mean((2, 3)))
    torch.testing.assert_close(module(given), expected)


def test_projections_only_where_the_shape_changes():
    module = AuxAdaptorAggregator(TAPS, 10)
    assert module.adaptors[0].project is None
    assert isinstance(module.adaptors[1].project, torch.nn.Identity)
    conv, norm = module.adaptors[2].project
    assert (conv.kernel_size, conv.stride) == ((1, 1), (2, 2))
    assert isinstance(norm, torch.nn.BatchNorm2d)


def test_a_projection_where_only_the_size_changes():
    taps = [Tap('a', (4, 8, 8)), Tap('b', (4, 4, 4))]
    conv, _ = AuxAdaptorAggregator(taps, 10).adaptors[1].project
    assert (conv.in_channels, conv.out_channels) == (4, 4)
    assert conv.stride == (2, 2)
    tokens = [Tap('a', (16, 4), 'tokens'), Tap('b', (4, 4), 'tokens')]
    linear, _ = AuxAdaptorAggregator(tokens, 10).adaptors[1].project
    assert (linear.in_features, linear.out_features) == (4, 4)
    same = [Tap('a', (2, 4, 4)), Tap('b', (16, 2), 'tokens')]
    project = AuxAdaptorAggregator(same, 10).adaptors[1].project
    assert isinstance(project, torch.nn.Identity)


@pytest.mark.parametrize('sizes', [(7, 4), (7, 3), (15, 8), (15, 7)])
def test_odd_sizes_are_rounded_as_the_blocks_do(sizes):
    taps = [
        Tap('stem', (2, sizes[0], sizes[0])),
        Tap('a', (4, *sizes[1:] * 2)),
    ]
    module = AuxAdaptorAggregator(taps, 10)
    assert module(outputs(2, taps)).shape == (2, 10)


def test_every_tap_gets_a_gradient():
    module = AuxAdaptorAggregator(TAPS, 10)
    given = outputs()
    samples = [DataSample().set_gt_label(i) for i in range(3)]
    loss_of(module, given, samples).backward()
    for name, value in given.items():
        assert value.grad.abs().sum() > 0, name


def test_the_loss_weight_scales_the_loss_and_is_not_stored():
    samples = [DataSample().set_gt_label(i) for i in range(3)]
    losses = []
    for weight in (1.0, 0.25):
        torch.manual_seed(0)
        module = AuxAdaptorAggregator(TAPS, 10, loss_weight=weight)
        losses.append(loss_of(module, outputs(), samples))
    torch.testing.assert_close(losses[1], losses[0] / 4)
    assert not any('loss_weight' in key for key in module.state_dict())


def test_the_loss_is_of_the_kind_of_the_main_head():
    smooth = LinearClsHead(
        10, 8, loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1)
    )
    module = AuxAdaptorAggregator(TAPS, 10)
    samples = [DataSample().set_gt_label(i) for i in range(3)]
    logits = module(outputs())
    expected = F.cross_entropy(logits, torch.arange(3), label_smoothing=0.1)
    # mmpretrain's mode 'original': smoothed over all classes
    torch.testing.assert_close(
        loss_of(module, outputs(), samples, smooth),
        expected,
    )


def test_mixed_targets():
    soft = head(use_soft=True)
    module = AuxAdaptorAggregator(TAPS, 10)
    score = torch.full((10,), 0.05)
    score[3] = 0.55
    samples = [DataSample().set_gt_score(score) for _ in range(3)]
    logits = module(outputs())
    expected = -(score * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(
        loss_of(module, outputs(), samples, soft),
        expected,
    )


def test_full_precision_under_autocast():
    given = outputs()
    for dtype, expected in (
        ('float32', torch.float32),
        (None, torch.bfloat16),
    ):
        module = AuxAdaptorAggregator(TAPS, 10, dtype=dtype)
        seen = []
        for part in module.modules():
            if isinstance(part, torch.nn.Conv2d):
                part.register_forward_hook(
                    lambda m, a, out, seen=seen: seen.append(out.dtype)
                )
        with torch.autocast('cpu', torch.bfloat16):
            half = {k: v.bfloat16() for k, v in given.items()}
            module(half)
        assert set(seen) == {expected}


def test_the_module_teaches_in_float32_under_autocast():
    module = AuxAdaptorAggregator(
        TAPS, 10, guides_student=dict(type='mmrazor.KLDivergence')
    )
    seen = set()
    module.guides_student.register_forward_pre_hook(
        lambda m, args: seen.update(x.dtype for x in args)
    )
    with torch.autocast('cpu', torch.bfloat16):
        logits = module(outputs())
        assert logits.dtype == torch.bfloat16
        found = module.losses(logits, logits + 1, None, lambda x: x.sum())
    assert seen == {torch.float32}
    assert found['loss_to_student'].dtype == torch.float32


def test_narrow_and_grouped_adaptors_cost_what_they_should():
    channels = 16
    taps = [Tap('stem', (channels, 4, 4)), Tap('a', (channels, 4, 4))]

    def convolution_weights(**settings):
        module = AuxAdaptorAggregator(taps, 10, **settings)
        return sum(
            m.weight.numel()
            for m in module.adaptors.modules()
            if isinstance(m, torch.nn.Conv2d)
        )

    full = convolution_weights()
    assert full == 2 * channels**2
    assert convolution_weights(width_ratio=0.25) == full / 4
    assert convolution_weights(groups=4) == full / 4


@pytest.mark.parametrize(
    'depth, parameters, multiply_adds',
    [(18, 1.39e6, 0.14e9), (50, 24.9e6, 3.66e9)],
)
def test_the_cost_on_imagenet_networks(depth, parameters, multiply_adds):
    """As computed by hand from the published layout."""
    architecture = classifier()
    architecture['backbone'] = dict(type='ResNet', depth=depth)
    architecture['head'].update(
        in_channels=512 if depth == 18 else 2048, num_classes=1000
    )
    model = joint_qat(architecture=architecture, input_shape=(3, 224, 224))
    cost = model.cost
    assert cost.guidance_parameters == pytest.approx(parameters, rel=0.01)
    assert cost.guidance_multiply_adds == pytest.approx(
        multiply_adds, rel=0.04
    )


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(width_ratio=0), 'guidance.width_ratio: .* got 0'),
        (dict(width_ratio=1.5), 'guidance.width_ratio: .* got 1.5'),
        (dict(groups=3), 'guidance.groups: expected a divisor .* got 3'),
        (dict(groups=0), 'guidance.groups: .* got 0'),
        (dict(dtype='float16'), "guidance.dtype: .* got 'float16'"),
        (dict(loss_weight=-1), 'guidance.loss_weight: .* got -1'),
        (
            dict(separate_bn=1),
            'separate_bn: expected True or False, got 1',
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        joint_qat(guidance=dict(AUX, **settings))


def test_taps_must_be_feature_maps_or_tokens():
    with pytest.raises(UsageError, match='feature maps .C, H, W. or tokens'):
        AuxAdaptorAggregator([Tap('stem', (10,))], 10)


MIXED = [
    Tap('stem', (4, 8, 8)),
    Tap('a', (8, 8, 6), 'channels_last'),
    Tap('b', (65, 6), 'tokens'),
    Tap('c', (17, 10), 'tokens'),
    Tap('d:0', (6, 4, 4)),
    Tap('d:1', (17, 10), 'tokens'),
    Tap('e', (7, 10), 'tokens'),
]


def test_g_is_carried_across_all_layouts():
    torch.manual_seed(0)
    module = AuxAdaptorAggregator(MIXED, 10)
    seen = outputs(2, MIXED)
    logits = module(seen)
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in seen.values())
    assert all(p.grad is not None for p in module.parameters())


def test_tokens_are_adapted_by_a_linear_layer_and_a_norm():
    taps = [Tap('a', (16, 6), 'tokens'), Tap('b', (4, 8), 'tokens')]
    module = AuxAdaptorAggregator(taps, 10)
    for layers in (module.adaptors[0].phi, module.adaptors[1].project):
        linear, norm = layers
        assert isinstance(linear, torch.nn.Linear) and linear.bias is None
        assert isinstance(norm, torch.nn.LayerNorm)
        assert norm.normalized_shape == (linear.out_features,)


def test_tokens_between_maps_have_the_size_of_the_next_map():
    taps = [Tap('a', (16, 8), 'tokens'), Tap('b', (8, 2, 8))]
    module = AuxAdaptorAggregator(taps, 10)
    adaptor, image = module.adaptors[1].eval(), torch.randn(2, 8, 2, 8)
    seen = torch.randn(2, 8, 2, 8)
    torch.testing.assert_close(
        adaptor([seen], image.flatten(2).transpose(1, 2)),
        F.relu(adaptor.phi(seen) + adaptor.project(image)),
    )


def test_several_token_tensors_of_one_tap_are_added():
    taps = [
        Tap('a:0', (17, 6), 'tokens'),
        Tap('a:1', (5, 4), 'tokens'),
    ]
    module = AuxAdaptorAggregator(taps, 10)
    seen = outputs(2, taps)
    # as many as there are of the fewest
    assert module.adaptors[0](list(seen.values()), None).shape == (2, 5, 4)
    logits = module(seen)
    logits.square().sum().backward()
    assert logits.shape == (2, 10)
    assert all(x.grad.abs().sum() > 0 for x in seen.values())


def test_of_several_maps_of_one_size_the_widest_counts():
    taps = [Tap('a:0', (4, 4, 4)), Tap('a:1', (8, 4, 4))]
    for order in (taps, taps[::-1]):
        module = AuxAdaptorAggregator(order, 10)
        assert module.adaptors[0].result.shape == (8, 4, 4)
        assert module(outputs(2, order)).shape == (2, 10)


def test_a_head_of_several_labels():
    several = MultiLabelLinearClsHead(10, 8)
    module = AuxAdaptorAggregator(TAPS, 10)
    samples = [DataSample().set_gt_label([i, i + 1]) for i in range(3)]
    logits = module(outputs())
    target = torch.zeros(3, 10)
    for i in range(3):
        target[i, [i, i + 1]] = 1
    # mmpretrain's: summed over the labels
    expected = F.binary_cross_entropy_with_logits(
        logits, target, reduction='sum'
    )
    found = loss_of(module, outputs(), samples, several)
    torch.testing.assert_close(found, expected / 3)


def test_groups_are_for_maps():
    with pytest.raises(UsageError, match='expected 1 for tokens'):
        AuxAdaptorAggregator([Tap('a', (4, 8), 'tokens')], 10, groups=2)


def test_the_guidance_learns():
    model = joint_qat()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    inputs, samples = batch(20)
    losses = []
    for _ in range(30):
        loss = model.loss(inputs, samples)['guidance.loss_aux']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
