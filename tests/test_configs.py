"""Every recipe is read and built, and takes a step."""

import json
import re
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.runner import Runner
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS

from mmauxq.algorithms import JointQAT
from mmauxq.compare.statistics import spread
from mmauxq.datasets import GeneratedImages
from mmauxq.guidance.teacher import build_network
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
GUIDANCE = dict(
    qat=[],
    aux=['mmauxq.AuxAdaptorAggregator'],
    dsn=['mmauxq.IntermediateClassifiers'],
    kd=['mmauxq.KnowledgeDistillation'],
    auxkd=['mmauxq.AuxAdaptorAggregator', 'mmauxq.KnowledgeDistillation'],
    bwr=['mmauxq.BlockReplacement'],
)
METAFILE = yaml.safe_load((ROOT / 'configs/metafile.yml').read_text())
RESULTS = {m['Name']: m for m in METAFILE['Models'] if 'Results' in m}
RESNET18 = 'resnet/resnet18_8xb32_in1k'
WIDTHS = {
    'w8a8': (8, 8), 'w4a16': (4, 16), 'w4a8': (4, 8), 'w4a4': (4, 4),
    'w3a3': (3, 3), 'w2a8': (2, 8), 'w2a2': (2, 2),
}  # fmt: skip
"""Of weights and activations."""


def read(path: Path) -> Config:
    return Config.fromfile(path)


def widths(config: Config) -> tuple[int, int]:
    quantizers = config.model.quantizers
    return quantizers.weight.bits, quantizers.activation.bits


def test_the_promised_recipes_are_there():
    promised = {
        f'{guidance}_{network}_{bits}'
        for guidance in ('aux', 'qat')
        for network in ('r18', 'r34', 'r50')
        for bits in ('w4a4', 'w3a3', 'w2a2')
    }
    promised |= {f'{arm}_r18_w2a2_tiny' for arm in ('bwr', 'dsn')}
    promised |= {f'{arm}_r20_w2a2_cifar10' for arm in ('aux', 'qat')}
    promised |= {'float_r20_cifar10', 'bwr_r20_w2a2_digits'}
    assert promised == {p.stem for p in CONFIGS if p.stem not in RESULTS}


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
    assert widths(config) == WIDTHS[bits]
    found = config.model.get('guidance') or []
    found = found if isinstance(found, list) else [found]
    assert [cfg.type for cfg in found] == GUIDANCE[guidance]


def test_every_recipe_is_in_the_metafile():
    listed = [model['Config'] for model in METAFILE['Models']]
    assert sorted(listed) == [f'configs/{path.name}' for path in CONFIGS]


@pytest.mark.parametrize('name', RESULTS)
def test_a_result_is_that_of_its_records(name):
    facts, (result,) = RESULTS[name]['Metadata'], RESULTS[name]['Results']
    assert result['Dataset'] == facts['Training Data']
    assert facts.get('Start', name) in RESULTS
    mean = result['Metrics']['Top 1 Accuracy']
    if 'Records' not in facts:
        assert name in ('float_r8_digits', 'float_r56_fmnist')
        return
    runs = recorded(ROOT / facts['Records'], facts.get('Arm'))
    assert len(runs) == facts['Seeds']
    text = f'{mean:.2f}'
    if len(runs) > 1:
        text += f' ± {facts["Standard Deviation"]:.2f}'
    assert spread(runs) == text


def recorded(file: Path, arm: str | None) -> list[float]:
    """Final top-1 of each seed: of an arm, or of a run's own log."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    if 'network' in rows[0]:
        return next(row['top1'] for row in rows if row['network'] == arm)
    if arm == 'float':  # the network that all arms of a seed start from
        return list({row['seed']: row['float_final'] for row in rows}.values())
    if 'arm' in rows[0]:
        return [row['final'] for row in rows if row['arm'] == arm]
    validations = [row for row in rows if 'accuracy/top1' in row]
    return [validations[-1]['accuracy/top1']]


def test_recipes_that_the_pages_name_are_there():
    pages = [ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md')]
    named = {
        name
        for page in pages
        for name in re.findall(r'\bconfigs/([a-z]\w+\.py)', page.read_text())
    }
    assert len(named) > 20
    assert named <= {path.name for path in CONFIGS}


def test_recipes_that_the_pages_spell_out_can_be_read(tmp_path):
    for page, count in (
        ('README.md', 1),
        ('docs/guidance.md', 3),
        ('docs/recipes.md', 1),
    ):
        text = (ROOT / page).read_text()
        recipes = re.findall(r'^( {4}_base_ = .*\n(?: {4}.*\n)+)', text, re.M)
        assert len(recipes) == count
        for lines in recipes:
            (tmp_path / 'mine.py').write_text(textwrap.dedent(lines))
            config = read(tmp_path / 'mine.py')
            assert config.model.type == 'mmauxq.JointQAT'
            assert config.model.architecture.type == 'ImageClassifier'
            assert 'train_dataloader' in config and 'optim_wrapper' in config


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
    config = read(three_lines(tmp_path, RESNET18, f'{guidance}_{bits}'))
    assert config.model.architecture.backbone.depth == 18
    assert widths(config) == WIDTHS[bits]
    found = config.model.get('guidance') or []
    found = found if isinstance(found, list) else [found]
    assert [cfg.type for cfg in found] == GUIDANCE[guidance]
    # mmpretrain's own schedule is kept
    assert config.optim_wrapper.optimizer.lr == 0.1


@pytest.mark.parametrize('recipe', ['kd', 'bwr'])
def test_a_child_config_has_another_teacher(tmp_path, recipe):
    """MMEngine lets no dict of a child take the place of ``None``."""
    teacher = dict(type='ImageClassifier', head=dict(num_classes=10))
    (tmp_path / 'child.py').write_text(
        f'_base_ = {str(ROOT / f"configs/{recipe}_r20_w2a2_digits.py")!r}\n'
        f'model = dict(guidance=dict(teacher={teacher}))\n'
    )
    guidance = read(tmp_path / 'child.py').model.guidance
    assert guidance.teacher == teacher
    assert guidance.logits.tau == 1.0


def test_the_deep_recipe_differs_in_its_depth_and_temperature():
    deep = read(ROOT / 'configs/auxkd_r56_w2a2_fmnist.py').model
    flat = read(ROOT / 'configs/auxkd_r20_w2a2_fmnist.py').model
    assert deep.architecture.backbone.depth == 56
    assert deep.guidance[1].logits.tau == 4
    deep.architecture.backbone.depth = 20
    deep.guidance[1].logits.tau = flat.guidance[1].logits.tau
    assert deep.to_dict() == flat.to_dict()


def test_the_recipe_with_a_wide_teacher_differs_in_it_and_in_its_rate():
    wide = read(ROOT / 'configs/kd_r18_w2a2_tiny_wide_teacher.py')
    flat = read(ROOT / 'configs/kd_r18_w2a2_tiny.py')
    teacher, side = build_network(wide.model.guidance.pop('teacher'))
    shapes = {
        name: tuple(value.shape)
        for name, value in MMPRETRAIN_MODELS.build(
            read(ROOT / 'configs/float_r18_wide_tiny.py').model
        ).state_dict().items()
    }  # fmt: skip
    assert shapes == {
        k: tuple(v.shape) for k, v in teacher.state_dict().items()
    }
    assert shapes['backbone.conv1.weight'] == (128, 3, 3, 3)
    assert shapes['head.fc.weight'] == (200, 1024)
    assert side == 64
    assert wide.model.guidance.logits.tau == 4
    assert wide.optim_wrapper.optimizer.lr == 0.01
    wide.model.guidance.logits.tau = flat.model.guidance.logits.tau
    wide.optim_wrapper.optimizer.lr = flat.optim_wrapper.optimizer.lr
    assert wide.to_dict() == flat.to_dict()


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


def three_lines(folder: Path, network: str, fragment: str) -> Path:
    """The documented recipe of a network of mmpretrain, as a file."""
    recipe = folder / 'mine.py'
    recipe.write_text(
        f"_base_ = ['mmpretrain::{network}.py',\n"
        f"          'mmauxq::_base_/{fragment}.py']\n"
        'model = dict(_delete_=True, architecture=_base_.model, '
        '**_base_.quantization)\n'
    )
    return recipe


@pytest.mark.parametrize(
    'network, fragment, terms',
    [
        ('aux_r18_w4a4', None, ['loss_aux']),
        ('aux_r50_w4a4', None, ['loss_aux']),
        (RESNET18, 'auxkd_w4a4', ['0.loss_aux', '1.loss_logits']),
        ('mobilenet_v2/mobilenet-v2_8xb32_in1k', 'aux_w4a4', ['loss_aux']),
        ('deit/deit-small_4xb256_in1k', 'aux_w4a4', ['loss_aux']),
        ('swin_transformer/swin-tiny_16xb64_in1k', 'aux_w4a4', ['loss_aux']),
    ],
)
def test_imagenet_networks_train_on_generated_images(
    network, fragment, terms, tmp_path
):
    """Two steps through the runner, at the shape and classes of ImageNet."""
    config = read(
        three_lines(tmp_path, network, fragment)
        if fragment
        else ROOT / f'configs/{network}.py'
    )
    config.work_dir = str(tmp_path)
    config.experiment_name = f'generated_{network}'.replace('/', '_')
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
