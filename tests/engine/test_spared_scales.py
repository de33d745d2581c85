import pytest
import torch
import torch.distributed as dist
from mmengine import optim
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import DefaultScope
from torch import nn

from mmauxq import compat
from mmauxq.engine.optimizers import spared_scales
from mmauxq.errors import UsageError

SGD = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4)
CUSTOM = dict(custom_keys={'conv.weight_quantizer': dict(lr_mult=0.1)})


class Scale(nn.Module):
    def __init__(self, shape=()):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))


class Network(nn.Module):
    def __init__(self, quantized=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        if quantized:
            self.conv.weight_quantizer = Scale((4, 1, 1, 1))
            self.conv.input_quantizer = Scale()


def build(model, optimizer=SGD, scope='mmengine', **kwargs):
    compat.spare_scales_from_decay()
    cfg = dict(optimizer=dict(optimizer), **kwargs)
    with DefaultScope.overwrite_default_scope(scope):
        return optim.build_optim_wrapper(model, cfg).optimizer


def decay_by_name(model, optimizer) -> dict:
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: group['weight_decay']
        for group in optimizer.param_groups
        for p in group['params']
    }


def test_two_groups_and_scales_do_not_decay():
    model = Network()
    optimizer = build(model)
    assert len(optimizer.param_groups) == 2
    decays = decay_by_name(model, optimizer)
    assert len(decays) == len(list(model.parameters()))
    for name, decay in decays.items():
        assert decay == (0 if 'quantizer' in name else 1e-4), name


def test_without_quantizers_as_mmengine():
    model = Network(quantized=False)
    theirs = DefaultOptimWrapperConstructor(dict(optimizer=dict(SGD)))(model)
    ours = build(model)
    assert ours.state_dict() == theirs.optimizer.state_dict()


@pytest.mark.parametrize(
    'paramwise', [CUSTOM, dict(norm_decay_mult=0.0), dict(bias_lr_mult=2.0)]
)
def test_with_paramwise_cfg(paramwise):
    model = Network()
    optimizer = build(model, paramwise_cfg=paramwise)
    decays = decay_by_name(model, optimizer)
    assert decays['conv.weight_quantizer.scale'] == 0
    assert decays['conv.input_quantizer.scale'] == 0
    assert decays['conv.weight'] == 1e-4
    if paramwise is CUSTOM:
        lrs = {id(g['params'][0]): g['lr'] for g in optimizer.param_groups}
        scale = model.conv.weight_quantizer.scale
        assert lrs[id(scale)] == pytest.approx(0.01)


@pytest.mark.parametrize(
    'paramwise, groups',
    [
        (CUSTOM, [4, 1, 1]),
        (dict(norm_decay_mult=0.0), [2, 4]),  # those of the norm as scales
        (dict(bias_lr_mult=2.0), [3, 1, 2]),
    ],
)
def test_parameters_of_the_same_settings_share_a_group(
    monkeypatch, paramwise, groups
):
    """And are trained as in the groups of one that MMEngine makes."""
    model = Network()
    optimizer = build(model, paramwise_cfg=paramwise)
    found = [len(group['params']) for group in optimizer.param_groups]
    assert sorted(found) == sorted(groups)
    assert sum(found) == len(list(model.parameters()))

    other = Network()
    other.load_state_dict(model.state_dict())

    def apart(groups, settings, parameters):
        groups[len(groups)] = dict(settings, params=parameters)

    monkeypatch.setattr(spared_scales, '_join', apart)
    single = build(other, paramwise_cfg=paramwise)
    assert len(single.param_groups) == len(list(model.parameters()))
    for each, step in ((model, optimizer), (other, single)):
        torch.manual_seed(0)
        for _ in range(3):
            for parameter in each.parameters():
                parameter.grad = torch.randn_like(parameter)
            step.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_user_may_decide_otherwise():
    keys = {'weight_quantizer.': dict(decay_mult=2.0)}
    model = Network()
    optimizer = build(model, paramwise_cfg=dict(custom_keys=keys))
    decays = decay_by_name(model, optimizer)
    assert decays['conv.weight_quantizer.scale'] == 2e-4


def test_optimizer_with_decay_by_default():
    model = Network()
    decays = decay_by_name(model, build(model, dict(type='AdamW', lr=0.1)))
    assert decays['conv.input_quantizer.scale'] == 0
    assert decays['conv.weight'] == 0.01


def test_optimizer_without_decay():
    model = Network()
    optimizer = build(model, dict(type='Rprop', lr=0.1))
    held = [p for group in optimizer.param_groups for p in group['params']]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert not any('weight_decay' in g for g in optimizer.param_groups)


def test_frozen_parameters_are_kept_as_mmengine_does():
    model = Network()
    model.norm.requires_grad_(False)
    decays = decay_by_name(model, build(model))
    assert 'norm.weight' in decays


@pytest.mark.parametrize('scope', ['mmengine', 'mmpretrain'])
def test_default_of_every_scope(scope):
    import mmpretrain.engine  # noqa: F401

    assert len(build(Network(), scope=scope).param_groups) == 2


@pytest.mark.parametrize('by_class', [False, True])
def test_whatever_the_constructor(by_class):
    """MMPretrain's, whose groups hold one parameter each, and know nothing of
    scales of no dimension."""
    from mmpretrain.engine import LearningRateDecayOptimWrapperConstructor

    class Layered(Network):
        def get_layer_depth(self, name, prefix=''):
            return ('weight' in name), 2

    kind = LearningRateDecayOptimWrapperConstructor
    model = Layered()
    optimizer = build(
        model,
        dict(type='AdamW', lr=0.1, weight_decay=0.05),
        scope='mmpretrain',
        constructor=kind if by_class else kind.__name__,
        paramwise_cfg=dict(layer_decay_rate=0.5),
    )
    decays = decay_by_name(model, optimizer)
    assert decays['conv.weight_quantizer.scale'] == 0
    assert decays['conv.input_quantizer.scale'] == 0
    assert decays['conv.weight'] == 0.05
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {
        names[id(p)]: group['lr']
        for group in optimizer.param_groups
        for p in group['params']
    }
    assert rates['conv.bias'] == 0.05 and rates['conv.weight'] == 0.1
    assert rates['conv.weight_quantizer.scale'] == 0.1


def test_several_optimizers():
    """Of a constructor that gives an OptimWrapperDict."""

    class Two:
        def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
            self.cfg = optim_wrapper_cfg

        def __call__(self, model):
            make = DefaultOptimWrapperConstructor(self.cfg)
            return optim.OptimWrapperDict(a=make(model), b=make(model))

    compat.spare_scales_from_decay()
    model = Network()
    cfg = dict(optimizer=dict(SGD), constructor=Two)
    wrapper = optim.build_optim_wrapper(model, cfg)
    for each in wrapper.values():
        decays = decay_by_name(model, each.optimizer)
        assert decays['conv.input_quantizer.scale'] == 0


def test_sgd_on_a_cpu_is_grouped_and_gives_the_same_numbers():
    nesterov = dict(SGD, nesterov=True)
    models = [Network(), Network()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [
        build(models[0], nesterov),
        build(models[1], dict(nesterov, foreach=False)),
    ]
    grouped = [o.param_groups[0]['foreach'] for o in optimizers]
    assert grouped == [True, False]
    for _ in range(3):
        for one, other in zip(
            models[0].parameters(), models[1].parameters(), strict=True
        ):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(
        models[0].parameters(), models[1].parameters(), strict=True
    ):
        assert torch.equal(one, other)
    adam = build(Network(), dict(type='Adam', lr=0.1))
    assert adam.param_groups[0]['foreach'] is None


def test_an_optimizer_whose_groups_are_copied_is_refused(tmp_path):
    dist.init_process_group(
        'gloo', f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        model = Network()
        zero = dict(
            type='ZeroRedundancyOptimizer',
            optimizer_type='SGD',
            lr=0.1,
            weight_decay=1e-4,
        )
        with pytest.raises(UsageError, match='got ZeroRedundancyOptimizer'):
            build(model, zero)
        build(Network(quantized=False), zero)
    finally:
        dist.destroy_process_group()
