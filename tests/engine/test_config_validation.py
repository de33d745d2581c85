"""What is checked of a config before anything is built."""

import math

import pytest
from mmengine.config import Config

import mmauxq  # noqa: F401
from mmauxq.algorithms import JointQAT
from mmauxq.backbones import CIFARResNet
from mmauxq.compare.arms import build_model
from mmauxq.datasets import Digits
from mmauxq.engine.config_validation import (
    RUN_SETTINGS,
    arguments_of,
    check_settings,
    merge_options,
    own_class,
    own_names,
    settle_own_sections,
)
from mmauxq.engine.hooks import EpochLengthHook, SafeCheckpointHook
from mmauxq.errors import UsageError
from mmauxq.quantizers import LSQ
from tests.conftest import ROOT

RECIPES = sorted((ROOT / 'configs').glob('*.py'))


def changed(key, value, name='auxkd_r20_w2a2_digits'):
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    *way, last = key.split('.')
    section = cfg._cfg_dict
    for part in way:
        section = section[int(part) if part.isdigit() else part]
    section[last] = value
    return cfg


# --- KEY=VALUE over a config -------------------------------------------------


def config() -> Config:
    return Config(
        dict(
            model=dict(depth=20, guidance=None),
            steps=[dict(lr=1, betas=[0.9, 0.99]), dict(lr=2)],
        )
    )


@pytest.mark.parametrize(
    'key, value, found',
    [
        ('model.depth', 56, lambda c: c.model.depth),
        ('model.guidance', 'x', lambda c: c.model.guidance),
        ('model.new.deep', 3, lambda c: c.model.new.deep),
        ('steps.1.lr', 5, lambda c: c.steps[1].lr),
        ('steps.0.betas.1', 0.5, lambda c: c.steps[0].betas[1]),
        ('steps.1', dict(lr=7), lambda c: c.steps[1]),
        ('sync_bn', 'torch', lambda c: c.sync_bn),
        ('randomness.seed', 3, lambda c: c.randomness.seed),
    ],
)
def test_values_are_where_the_keys_say(key, value, found):
    cfg, others = config(), config()
    merge_options(cfg, {key: value}, '--cfg-options')
    assert found(cfg) == value
    top = key.split('.')[0]
    assert all(cfg[k] == v for k, v in others.items() if k != top)
    assert cfg.steps[0].lr == 1 and cfg.steps[0].betas[0] == 0.9


@pytest.mark.parametrize(
    'key, message',
    [
        ('steps.lr', "expected a number below 2 after steps, got 'lr'"),
        ('steps.2', "expected a number below 2 after steps, got '2'"),
        ('steps.0.betas.x', 'expected a number below 2 after steps.0.betas,'),
        ('steps.2.lr', 'Index 2 exceeds the length of list'),
        ('steps.x.lr', 'list indices must be integers'),
        ('model.depth.x', "depth is a dict .* but is of type <class 'int'>"),
        ('model.guidance.type', 'guidance is a dict .*NoneType'),
        ('self', "expected one of model, steps, got 'self'"),
        ('steeps.0.lr', ".*, got 'steeps'; did you mean steps"),
    ],
)
def test_keys_that_lead_nowhere_are_one_line(key, message):
    cfg = config()
    with pytest.raises(UsageError, match=f'^arm a: {key}: .*{message}'):
        merge_options(cfg, {key: 1}, 'arm a:')
    assert cfg._cfg_dict == config()._cfg_dict


# --- settings that MMEngine misreads ---------------------------------------


@pytest.mark.parametrize(
    'key, value, message',
    [
        ('train_dataloader', 3, 'expected a dict, got 3'),
        ('train_dataloader.sampler', 'abc', "expected a dict, got 'abc'"),
        ('val_dataloader', [], 'expected a dict or None, got []'),
        ('custom_hooks', {}, 'expected a list or None, got {}'),
        ('default_hooks.visualization', None, 'expected a dict, got None'),
        ('train_cfg.by_epoch', 'False', "expected True or False, got 'False'"),
        ('resume', 1, 'expected True or False, got 1'),
        ('train_dataloader.sampler.shuffle', 'False', 'expected True or'),
        ('train_cfg.max_epochs', 0, 'expected an integer from 1, got 0'),
        ('train_cfg.val_interval', -1, 'expected an integer from 1, got -1'),
        ('train_cfg.val_begin', math.nan, 'expected an integer from 0, got'),
        ('train_dataloader.num_workers', 0.5, 'an integer from 0, got 0.5'),
        ('param_scheduler.begin', math.nan, 'a finite number from 0, got nan'),
        ('param_scheduler.end', math.inf, 'a finite number from 0, got inf'),
        ('val_evaluator.topk', [1, 0], 'an integer from 1, or a list of'),
    ],
)  # fmt: skip
def test_a_setting_that_would_be_misread(key, value, message):
    cfg = changed(key, value, 'qat_r20_w2a2_digits')
    with pytest.raises(UsageError) as error:
        check_settings(cfg, 'a.py')
    assert str(error.value).startswith(f'{key}: ')
    assert message in str(error.value)


@pytest.mark.parametrize(
    'key, value, message',
    [
        ('train_cfg', None, 'a.py has no `train_cfg`'),
        ('train_cfg', dict(max_epochs=3),
         "train_cfg: expected `by_epoch` or `type`, got {'max_epochs': 3}"),
        ('optim_wrapper', {}, 'optim_wrapper has no `optimizer`'),
        ('val_dataloader', {}, 'val_dataloader has no `dataset`'),
        ('train_dataloader.batch_size', None,
         'train_dataloader has no `batch_size`'),
    ],
)  # fmt: skip
def test_what_a_training_needs(key, value, message):
    cfg = changed(key, value, 'qat_r20_w2a2_digits')
    with pytest.raises(UsageError) as error:
        check_settings(cfg, 'a.py')
    assert str(error.value) == message


@pytest.mark.parametrize(
    'key, value',
    [
        ('val_dataloader', None),
        ('default_hooks.timer', None),
        ('custom_hooks', None),
        ('val_evaluator.topk', (1, 5)),
        ('resume', True),
        # arguments of other packages are theirs to check
        ('optim_wrapper.optimizer.lr', 'fast'),
        ('model.architecture.head.in_channels', [256, 384]),
        ('randomness', dict(seed='abc')),
    ],
)
def test_what_is_left_to_its_owner(key, value):
    check_settings(changed(key, value, 'qat_r20_w2a2_digits'), 'a.py')


def test_a_batch_sampler_has_the_size():
    cfg = changed('train_dataloader.batch_size', None, 'qat_r20_w2a2_digits')
    cfg.train_dataloader.batch_sampler = dict(type='BatchSampler')
    check_settings(cfg, 'a.py')


# --- sections of this package ----------------------------------------------


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_the_recipes_themselves_are_right(path):
    cfg = Config.fromfile(path)
    before = cfg.to_dict()
    check_settings(cfg, str(path))
    settle_own_sections(cfg)
    assert cfg.to_dict() == before


@pytest.mark.parametrize(
    'key, value, message',
    [
        ('model.quantizer', {}, 'model: expected one of architecture, '
         'quantizers, .*; did you mean quantizers'),
        ('model.guidance.0.los_weight', 1, 'model.guidance.0: expected one '
         'of taps, loss_weight, .*los_weight.; did you mean loss_weight'),
        ('model.guidance.1.tau', 1, 'model.guidance.1: expected one of taps, '
         'teacher, .*logits, .*tau'),
        ('model.guidance.1.teacher', dict(model=dict(
            type='ImageClassifier',
            backbone=dict(type='mmauxq.CIFARResNet', dept=20))),
         r'model.guidance.1.teacher.model.backbone: .*did you mean depth'),
        ('model.quantizers.weight.bit', 2, 'model.quantizers.weight: expected '
         "one of bits, per_channel, got 'bit'; did you mean bits"),
        ('model.architecture.backbone.base_chanels', 2,
         'model.architecture.backbone: .*did you mean base_channels'),
        ('train_dataloader.dataset.splitt', 'x',
         'train_dataloader.dataset: expected one of split, .*mean split'),
        ('train_dataloader.dataset',
         dict(type='mmauxq.GeneratedImages', shap=(1, 2, 3)),
         'expected one of length, shape, num_classes, .*, got .shap.'),
        ('custom_hooks', [dict(type='mmauxq.GuidanceWeightHook', ende=1)],
         'custom_hooks.0: expected one of end_weight, .*got .ende.'),
        ('model.guidance.0.type', 'mmauxq.AuxAdaptorAgregator',
         'model.guidance.0.type: expected one of mmauxq.AuxAdaptorAggregator, '
         'mmauxq.BlockReplacement, mmauxq.IntermediateClassifiers, '
         'mmauxq.KnowledgeDistillation, got '
         '.*; did you mean mmauxq.AuxAdaptorAggregator'),
        ('model.quantizers.weight.type', 'mmauxq.LSK',
         r'model.quantizers.weight.type: .*mmauxq.LSQ, mmauxq.LSQPlus, .*did '
         'you mean mmauxq.LSQ'),
        ('train_dataloader.dataset.type', 'mmauxq.Digit',
         'train_dataloader.dataset.type: .*did you mean mmauxq.Digits'),
        ('model.type', 'mmauxq.Xyz', 'model.type: .*mmauxq.Digits, .*got'),
    ],
)  # fmt: skip
def test_a_slip_names_its_place_and_the_nearest_name(key, value, message):
    with pytest.raises(UsageError, match=message) as error:
        settle_own_sections(changed(key, value))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'key, value',
    [
        # what builders take, and what is not ours
        ('model.quantizers.weight.per_channel', True),
        ('custom_hooks', [dict(type='mmauxq.BatchNormHook', priority='LOW')]),
        ('train_cfg', dict(type='mmauxq.EpochLoop', max_epochs=1)),
        ('optim_wrapper', dict(type='mmauxq.CPUAmpOptimWrapper',
                               constructor='x', optimizer={})),
        ('model.guidance.1.logits.anything', 1),
        ('model.architecture.head.anything', 1),
        ('val_evaluator.anything', 1),
        # a variable that nothing reads
        ('leftover', dict(type='mmauxq.LSQ', anything=1)),
    ],
)  # fmt: skip
def test_what_is_let_through(key, value):
    settle_own_sections(changed(key, value))


def test_classes_by_their_name_and_as_they_are():
    for kind in ('mmauxq.LSQ', LSQ, 'mmauxq.quantizers.LSQ',
                 'mmauxq.quantizers.lsq.LSQ'):  # fmt: skip
        assert own_class(kind) is LSQ
    for kind in ('mmauxq.Nope', 'mmauxq.nope.Nope', 'LSQ', dict, None, []):
        assert own_class(kind) is None
    cfg = Config(dict(model=dict(type=JointQAT, quantizer=1)))
    with pytest.raises(UsageError, match='did you mean quantizers'):
        settle_own_sections(cfg)


def test_arguments_include_those_handed_on():
    assert arguments_of(Digits)[:3] == ['split', 'pipeline', 'ann_file']
    assert {'skip', 'deep_stem', 'norm_eval'} <= set(arguments_of(CIFARResNet))
    assert arguments_of(EpochLengthHook) == []
    assert arguments_of(SafeCheckpointHook) is None  # it checks them itself


def test_all_names_are_known():
    names = own_names()
    some = ('JointQAT', 'LSQ', 'Digits', 'EpochLoop', 'collated')
    assert {f'mmauxq.{name}' for name in some} <= set(names)
    assert list(names) == sorted(names)


def test_the_mark_of_an_inherited_config_is_removed(tmp_path):
    (tmp_path / 'mine.py').write_text(
        "_base_ = ['mmauxq::_base_/networks/digits_r20.py',\n"
        "          'mmauxq::_base_/aux_w2a2.py',\n"
        "          'mmauxq::_base_/schedules/digits_w2a2.py']\n"
        'model = dict(_delete_=True, architecture=_base_.model,\n'
        '             **_base_.quantization)\n'
    )
    cfg = Config.fromfile(tmp_path / 'mine.py')
    assert cfg.model.architecture['_scope_'] == 'mmauxq'
    settle_own_sections(cfg)
    for section in (
        cfg.model,
        cfg.model.architecture,
        cfg.optim_wrapper,
        cfg.train_dataloader.dataset,
        cfg.val_evaluator,
    ):
        assert '_scope_' not in section
    # mmpretrain's own mark stays, and a bare name of ours gets its scope
    cfg = Config(
        dict(
            model=dict(
                type='JointQAT',
                _scope_='mmauxq',
                architecture=dict(
                    type='ImageClassifier', _scope_='mmpretrain'
                ),
            )
        )
    )
    settle_own_sections(cfg)
    assert cfg.model.type == 'mmauxq.JointQAT'
    assert cfg.model.architecture['_scope_'] == 'mmpretrain'


@pytest.mark.parametrize(
    'name, size',
    [('aux_r20_w2a2_digits', (1, 8, 8)), ('kd_r20_w4a4_fmnist', (1, 28, 28))],
)
def test_a_whole_recipe_is_inherited(tmp_path, name, size):
    """MMEngine wants a folder after the colons."""
    (tmp_path / 'mine.py').write_text(
        f"_base_ = 'mmauxq::_base_/../{name}.py'"
    )
    cfg = Config.fromfile(tmp_path / 'mine.py')
    settle_own_sections(cfg)
    assert _scopes_of_a_run(cfg) <= {'mmpretrain'}
    model = build_model(cfg)
    assert model.cost.shape == size


@pytest.mark.parametrize('data', ['digits', 'fmnist'])
def test_networks_and_data_are_inherited(tmp_path, data):
    (tmp_path / 'mine.py').write_text(
        f"_base_ = ['mmauxq::_base_/networks/{data}_r20.py',\n"
        "          'mmauxq::_base_/aux_w2a2.py']\n"
        'model = dict(_delete_=True, architecture=_base_.model,\n'
        '             input_shape=_base_.input_shape,\n'
        '             **_base_.quantization)\n'
    )
    cfg = Config.fromfile(tmp_path / 'mine.py')
    settle_own_sections(cfg)
    assert _scopes_of_a_run(cfg) <= {'mmpretrain'}
    assert build_model(cfg).cost.num_classes == 10


def _scopes_of_a_run(cfg):
    settings = cfg.to_dict().items()
    return _scopes({k: v for k, v in settings if k in RUN_SETTINGS})


def _scopes(value):
    if isinstance(value, dict):
        own = {value['_scope_']} if '_scope_' in value else set()
        return own.union(*map(_scopes, value.values()))
    if isinstance(value, list):
        return set().union(*map(_scopes, value))
    return set()
