"""Sections of our own classes, looked through before anything is built."""

import pytest
from mmengine.config import Config

import mmauxq  # noqa: F401
from mmauxq.algorithms import JointQAT
from mmauxq.backbones import CIFARResNet
from mmauxq.compare.training_run import build_model
from mmauxq.datasets import Digits
from mmauxq.engine.hooks import EpochLengthHook, SafeCheckpointHook
from mmauxq.engine.options import settings_of_a_run
from mmauxq.engine.own_sections import (
    arguments_of,
    own_class,
    own_names,
    settle_own_sections,
)
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


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_the_recipes_themselves_are_right(path):
    cfg = Config.fromfile(path)
    before = cfg.to_dict()
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
         'expected one of length, shape, num_classes, distinct, got .shap.'),
        ('custom_hooks', [dict(type='mmauxq.GuidanceWeightHook', ende=1)],
         'custom_hooks.0: expected one of end_weight, .*got .ende.'),
        ('model.guidance.0.type', 'mmauxq.AuxAdaptorAgregator',
         'model.guidance.0.type: expected one of mmauxq.AuxAdaptorAggregator, '
         'mmauxq.IntermediateClassifiers, mmauxq.KnowledgeDistillation, got '
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
    assert {'JointQAT', 'LSQ', 'Digits', 'EpochLoop', 'collated'} <= set(names)
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
    run = settings_of_a_run()
    return _scopes({k: v for k, v in cfg.to_dict().items() if k in run})


def _scopes(value):
    if isinstance(value, dict):
        own = {value['_scope_']} if '_scope_' in value else set()
        return own.union(*map(_scopes, value.values()))
    if isinstance(value, list):
        return set().union(*map(_scopes, value))
    return set()
