"""Every recipe is read and built, and takes a step."""

from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.runner import Runner

from mmauxq.algorithms import JointQAT
from mmauxq.datasets import GeneratedImages
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
GUIDANCE = dict(
    qat=[],
    aux=['mmauxq.AuxAdaptorAggregator'],
    dsn=['mmauxq.IntermediateClassifiers'],
    kd=['mmauxq.KnowledgeDistillation'],
    auxkd=['mmauxq.AuxAdaptorAggregator', 'mmauxq.KnowledgeDistillation'],
)
WIDTHS = {'w8a8': 8, 'w4a4': 4, 'w3a3': 3, 'w2a2': 2}


def read(path: Path) -> Config:
    return Config.fromfile(path)


def test_the_promised_recipes_are_there():
    names = {path.stem for path in CONFIGS}
    promised = {
        f'{guidance}_{network}_{bits}'
        for guidance in ('aux', 'dsn', 'kd', 'qat')
        for network in ('r18', 'r34', 'r50')
        for bits in ('w4a4', 'w3a3', 'w2a2')
    }
    promised |= {
        f'auxkd_{network}_{bits}'
        for network in ('r18', 'r34', 'r50')
        for bits in ('w4a4', 'w2a2')
    }
    promised |= {
        f'{guidance}_{network}_w4a4'
        for guidance in ('aux', 'qat')
        for network in NETWORKS[3:]
    }
    promised |= {
        f'{g}_r20_{bits}_fmnist'
        for g in ('aux', 'auxkd', 'dsn', 'kd', 'qat')
        for bits in ('w4a4', 'w2a2')
    }
    promised |= {
        f'{g}_r20_w2a2_digits' for g in ('aux', 'auxkd', 'dsn', 'kd', 'qat')
    }
    promised |= {f'{g}_r8_w2a2_digits' for g in ('aux', 'qat')}
    promised |= {'float_r8_digits'}
    promised |= {'float_r20_fmnist', 'float_r20_digits', 'float_r56_fmnist'}
    promised |= {f'{g}_r56_w2a2_fmnist' for g in ('auxkd', 'qat')}
    assert promised <= names


def test_basenames_are_unique():
    """Else ``mim`` cannot tell which one is meant."""
    names = [path.name for path in (ROOT / 'configs').rglob('*.py')]
    assert len(names) == len(set(names))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_says_what_its_name_says(path):
    config = read(path)
    assert config.default_scope == 'mmpretrain'
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
        assert key in config
    if path.stem.startswith('float'):
        assert config.model.type == 'ImageClassifier'
        return
    guidance, _, bits = path.stem.split('_')[:3]
    assert config.model.type == 'mmauxq.JointQAT'
    assert {q.bits for k, q in config.model.quantizers.items()} == {
        WIDTHS[bits]
    }
    found = config.model.get('guidance') or []
    found = found if isinstance(found, list) else [found]
    assert [cfg.type for cfg in found] == GUIDANCE[guidance]


def test_every_recipe_is_in_the_metafile():
    metafile = yaml.safe_load((ROOT / 'configs/metafile.yml').read_text())
    listed = [model['Config'] for model in metafile['Models']]
    recipes = [path for path in CONFIGS if not path.stem.startswith('float')]
    assert sorted(listed) == [f'configs/{path.name}' for path in recipes]


@pytest.mark.parametrize('bits, decay', [(4, 1e-4), (3, 5e-5), (2, 2.5e-5)])
def test_the_schedule_of_the_literature(bits, decay):
    config = read(ROOT / f'configs/aux_r18_w{bits}a{bits}.py')
    assert config.optim_wrapper.optimizer.weight_decay == decay
    assert config.optim_wrapper.optimizer.lr == 0.01
    assert config.train_cfg.max_epochs == config.param_scheduler.T_max == 90
    assert config.train_dataloader.batch_size == 32  # times 8 GPUs


@pytest.mark.parametrize('guidance', GUIDANCE)
@pytest.mark.parametrize('bits', WIDTHS)
def test_every_fragment_can_be_inherited(tmp_path, guidance, bits):
    """The three lines of the contract, outside of this repository."""
    recipe = tmp_path / 'mine.py'
    recipe.write_text(
        "_base_ = ['mmpretrain::resnet/resnet18_8xb32_in1k.py',\n"
        f"          'mmauxq::_base_/{guidance}_{bits}.py']\n"
        'model = dict(_delete_=True, architecture=_base_.model, '
        '**_base_.quantization)\n'
    )
    config = read(recipe)
    assert config.model.architecture.backbone.depth == 18
    assert config.model.quantizers.weight.bits == WIDTHS[bits]
    found = config.model.get('guidance') or []
    found = found if isinstance(found, list) else [found]
    assert [cfg.type for cfg in found] == GUIDANCE[guidance]
    # mmpretrain's own schedule is kept
    assert config.optim_wrapper.optimizer.lr == 0.1


def test_the_deep_recipe_differs_in_its_depth_and_temperature():
    deep = read(ROOT / 'configs/auxkd_r56_w2a2_fmnist.py').model
    flat = read(ROOT / 'configs/auxkd_r20_w2a2_fmnist.py').model
    assert deep.architecture.backbone.depth == 56
    assert deep.guidance[1].logits.tau == 4
    deep.architecture.backbone.depth = 20
    deep.guidance[1].logits.tau = flat.guidance[1].logits.tau
    assert deep.to_dict() == flat.to_dict()


def test_one_of_several_guidances_is_overridden():
    """As by --cfg-options."""
    config = read(ROOT / 'configs/auxkd_r20_w2a2_digits.py')
    config.merge_from_dict(
        {
            'model.guidance.0.guides_student.type': 'mmrazor.KLDivergence',
            'model.guidance.1.logits.tau': 4,
        }
    )
    aux, kd = config.model.guidance
    assert aux.guides_student.type == 'mmrazor.KLDivergence'
    assert (kd.logits.tau, kd.logits.type) == (4, 'mmrazor.KLDivergence')


NETWORKS = [
    'r18',
    'r34',
    'r50',
    'mbv2',
    'regnetx400mf',
    'effnetb0',
    'convnextt',
    'deits',
    'swint',
]


@pytest.mark.parametrize(
    'network, terms',
    [(f'aux_{network}', ['loss_aux']) for network in NETWORKS]
    + [('auxkd_r18', ['0.loss_aux', '1.loss_logits'])],
)
def test_imagenet_recipes_train_on_generated_images(network, terms, tmp_path):
    """Two steps through the runner, at the recipe's shape and classes."""
    config = read(ROOT / f'configs/{network}_w4a4.py')
    config.work_dir = str(tmp_path)
    config.experiment_name = f'generated_{network}'
    config.randomness = dict(seed=0)
    config.log_level = 'ERROR'
    config.model.float_checkpoint = None  # it would be downloaded
    config.train_dataloader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=True),
        dataset=dict(type='mmauxq.GeneratedImages', length=4, distinct=4),
    )
    config.train_cfg.max_epochs = 1
    if isinstance(config.param_scheduler, list):
        config.param_scheduler = None  # a warm-up longer than two steps
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        config[key] = None
    del config.default_hooks['checkpoint']
    config.default_hooks['checkpoint'] = None
    runner = Runner.from_cfg(config)
    model = runner.model
    assert isinstance(model, JointQAT)
    weight = next(
        m.weight
        for m in model.architecture.modules()
        if hasattr(m, 'weight_quantizer')
    )
    before = weight.detach().clone()
    runner.train()
    assert runner.iter == 2
    assert torch.isfinite(weight).all() and not torch.equal(weight, before)
    for term in terms:
        scalar = runner.message_hub.get_scalar(f'train/guidance.{term}')
        history = scalar.data[0]
        assert len(history) == 2 and all(value > 0 for value in history)


def test_generated_images_are_the_same_every_time():
    first, second = (
        GeneratedImages(10, (3, 4, 4), 5),
        GeneratedImages(10, (3, 4, 4), 5),
    )
    assert torch.equal(first[7]['inputs'], second[7]['inputs'])
    assert first[7]['inputs'].dtype == torch.uint8
    labels = {first[i]['data_samples'].gt_label.item() for i in range(10)}
    assert labels == set(range(5))
    with pytest.raises(IndexError):
        first[10]
