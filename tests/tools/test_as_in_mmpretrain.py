"""What users of MMPretrain have in their configs, through the commands."""

import contextlib
import io
import json

import pytest
import torch
from mmengine.config import Config

from mmauxq.checkpoint_file import read_checkpoint
from tests.commands import (
    audit_command,
    compare_command,
    evaluate,
    export_command,
    train,
)
from tests.conftest import ROOT

AUX = f"""
_base_ = ['config.py', '{ROOT}/configs/_base_/aux_w4a4.py']
experiment_name = _base_.experiment_name
custom_imports = dict(imports=['toyset', 'moresets'])
architecture = dict(
    type='ImageClassifier',
    backbone=dict(type='mmauxq.CIFARResNet', depth=8, base_channels=4),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=16))
model = dict(
    _delete_=True, architecture=architecture, **_base_.quantization)
train_cfg = dict(max_epochs=1)
"""
FLOAT = """
_base_ = 'aux.py'
model = dict(_delete_=True, **_base_.architecture)
"""
SEVERAL = """
_base_ = 'aux.py'
data = dict(type='Several')
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = dict(dataset=data)
val_evaluator = dict(_delete_=True, type='MultiLabelMetric')
test_evaluator = val_evaluator
model = dict(architecture=dict(head=dict(type='MultiLabelLinearClsHead')))
"""
MIRRORED = """
_base_ = 'BASE'
data = dict(type='Mirrored', pipeline=[dict(type='PackInputs')])
test_dataloader = dict(dataset=data)
"""
MORESETS = """
import torch
from mmengine.dataset import Compose
from mmpretrain.registry import DATASETS
from toyset import ToySet

@DATASETS.register_module(force=True)
class Several(ToySet):
    'Two labels for each image.'
    def __getitem__(self, i):
        item = super().__getitem__(i)
        sample = item['data_samples']
        sample.set_gt_label([0, 1 + i % 2])
        sample.set_field(3, 'num_classes', field_type='metainfo')
        return item

@DATASETS.register_module(force=True)
class Mirrored(ToySet):
    'Images that are their own mirror images.'
    def __init__(self, pipeline):
        self.pipeline = Compose(list(pipeline))
    def __getitem__(self, i):
        torch.manual_seed(i)
        half = torch.randint(0, 255, (8, 4, 3), dtype=torch.uint8)
        image = torch.cat([half, half.flip(1)], 1).numpy()
        return self.pipeline(dict(img=image, gt_label=i % 3))
"""
LAZY = """
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import (
    CrossEntropyLoss, GlobalAveragePooling, ImageClassifier, LinearClsHead)
from torch.optim import SGD

from mmauxq.algorithms import JointQAT
from mmauxq.backbones import CIFARResNet
from mmauxq.datasets import GeneratedImages
from mmauxq.guidance import AuxAdaptorAggregator
from mmauxq.quantizers import LSQ

default_scope = 'mmpretrain'
loader = dict(
    batch_size=4, num_workers=0,
    dataset=dict(
        type=GeneratedImages, length=8, shape=(3, 8, 8), num_classes=3),
    sampler=dict(type=DefaultSampler, shuffle=False))
train_dataloader = loader
val_dataloader = loader
test_dataloader = loader
val_evaluator = dict(type=Accuracy, topk=(1,))
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(type=CheckpointHook))
optim_wrapper = dict(optimizer=dict(type=SGD, lr=0.01))
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=1)
val_cfg = dict()
test_cfg = dict()
architecture = dict(
    type=ImageClassifier,
    backbone=dict(type=CIFARResNet, depth=8, base_channels=4),
    neck=dict(type=GlobalAveragePooling),
    head=dict(
        type=LinearClsHead, num_classes=3, in_channels=16,
        loss=dict(type=CrossEntropyLoss)))
model = dict(
    type=JointQAT, architecture=architecture,
    quantizers=dict(
        weight=dict(type=LSQ, bits=4), activation=dict(type=LSQ, bits=4)),
    guidance=dict(type=AuxAdaptorAggregator))
"""


@pytest.fixture
def aux(project):
    """``aux.py`` with guidance, ``float.py`` without, and more data sets."""
    (project / 'aux.py').write_text(AUX)
    (project / 'float.py').write_text(FLOAT)
    (project / 'several.py').write_text(SEVERAL)
    (project / 'moresets.py').write_text(MORESETS)
    return project


def last_line(capfd):
    return capfd.readouterr().out.splitlines()[-1]


def test_a_new_style_config(project, capfd):
    (project / 'lazy.py').write_text(LAZY)
    assert train(['lazy.py', '--work-dir', 'run']) == 0
    assert last_line(capfd).startswith('run/slim.pth: the network of epoch_1')
    dumped = Config.fromfile('run/lazy.py')
    assert dumped.train_cfg.type == 'mmauxq.EpochLoop'
    assert dumped.default_hooks.checkpoint.type == 'mmauxq.SafeCheckpointHook'
    # MMEngine keeps runs of one process by their names, which hold the second
    named = ['--cfg-options', 'experiment_name=tested']
    assert evaluate(['lazy.py', 'run/slim.pth', *named]) == 0
    before = json.loads(last_line(capfd))
    words = ['run/slim.pth', '--images', '8']
    assert export_command(['lazy.py', *words, '--out', 'ship']) == 0
    report = json.loads((project / 'ship/report.json').read_text())
    top1 = report['agreement']['slim.pth']['top1']
    assert 100 * top1 == before['accuracy/top1']
    assert report['guidance']['type'] == 'mmauxq.AuxAdaptorAggregator'
    # and as it was dumped, where types are paths
    named[-1] += '_again'
    assert evaluate(['run/lazy.py', 'run/slim.pth', *named]) == 0
    assert json.loads(last_line(capfd)) == before


@pytest.mark.parametrize('base', ['float.py', 'aux.py'])
def test_test_time_augmentation(aux, base, capfd):
    """It changes nothing for images that are their own mirror images; also
    where the model of the config is one that augments."""
    (aux / 'mirrored.py').write_text(MIRRORED.replace('BASE', base))
    (aux / 'averaged.py').write_text(
        "_base_ = 'mirrored.py'\n"
        "model = dict(_delete_=True, type='AverageClsScoreTTA', "
        'module=_base_.model)\n'
        "flips = [dict(type='RandomFlip', prob=p) for p in (0.0, 1.0)]\n"
        "data['pipeline'] = [dict(type='TestTimeAug', transforms=["
        "flips, [dict(type='PackInputs')]])]\n"
        'test_dataloader = dict(dataset=data)\n'.replace(
            "data['", "data = _base_.data\ndata['", 1
        )
    )
    assert train(['mirrored.py', '--work-dir', 'run']) == 0
    found = []
    for words in (['mirrored.py'], ['mirrored.py', '--tta'], ['averaged.py']):
        assert evaluate([words[0], 'run/epoch_1.pth', *words[1:]]) == 0
        found.append(json.loads(last_line(capfd)))
    assert found[0] == found[1] == found[2]


def test_tta_without_a_pipeline(project, capfd):
    torch.save(dict(state_dict=dict(x=torch.ones(1))), 'x.pth')
    assert evaluate(['config.py', 'x.pth', '--tta']) == 2
    assert '--tta: expected a `pipeline` of' in capfd.readouterr().err


def test_several_labels(aux):
    assert train(['several.py', '--work-dir', 'run']) == 0
    words = ['several.py', 'run/slim.pth', '--images', '8']
    assert audit_command(words) == 0
    more = ['--batch-norm', '2', '--weights', 'int8']
    assert export_command([*words, '--out', 'ship', *more]) == 0
    report = json.loads((aux / 'ship/report.json').read_text())
    assert report['agreement']['model.onnx']['same_class'] == 8
    assert report['agreement']['model.onnx']['top1'] is None
    import onnx

    properties = onnx.load('ship/model.onnx').metadata_props
    text = {entry.key: entry.value for entry in properties}
    assert text['postprocessing'] == 'probabilities = sigmoid(logits)'


@pytest.mark.parametrize(
    'name, guidance',
    [
        ('logits', dict(type='mmauxq.KnowledgeDistillation')),
        (
            'guides_student',
            dict(
                type='mmauxq.AuxAdaptorAggregator',
                guides_student=dict(type='mmrazor.KLDivergence'),
            ),
        ),
    ],
)
def test_no_softmax_over_several_labels(aux, capfd, name, guidance):
    with (aux / 'several.py').open('a') as file:
        file.write(f"model['guidance'] = dict(_delete_=True, **{guidance})")
    assert train(['several.py', '--work-dir', 'run']) == 2
    assert (
        f'guidance.{name}: expected a distance for a head of several labels, '
        'such as mmrazor.L2Loss, got KLDivergence'
    ) in capfd.readouterr().err


@pytest.mark.slow
def test_another_metric(aux, capfd):
    words = ['--arms', 'a=several.py', '--seeds', '0', '--out']
    assert compare_command([*words, 'out']) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert '--metric: expected one that the validation gives in perc' in error
    assert 'multi-label/f1-score' in error
    more = ['other', '--metric', 'multi-label/recall']
    assert compare_command([*words, *more]) == 0
    assert '| final multi-label/recall |' in capfd.readouterr().out


def test_the_inferencer_names_the_classes(aux, capfd):
    """Of a training checkpoint and of a slim one, without a warning."""
    from mmpretrain import ImageClassificationInferencer

    (aux / 'mirrored.py').write_text(MIRRORED.replace('BASE', 'aux.py'))
    with (aux / 'mirrored.py').open('a') as file:
        file.write('model = dict(input_shape=(3, 8, 8))')
    assert train(['mirrored.py', '--work-dir', 'run']) == 0
    image = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()
    found = []
    for file in ('epoch_1.pth', 'slim.pth'):
        capfd.readouterr()
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            ask = ImageClassificationInferencer(
                'mirrored.py', pretrained=f'run/{file}', device='cpu'
            )
            found.append(ask(image)[0])
        said = shown.getvalue() + ''.join(capfd.readouterr())
        assert 'missing keys' not in said
    assert found[0]['pred_class'] == found[1]['pred_class'] in ('a', 'b', 'c')
    meta = read_checkpoint('run/slim.pth')['meta']
    assert meta['dataset_meta'] == dict(classes=['a', 'b', 'c'])


def test_mixed_precision_of_a_config_without_a_gpu(aux):
    if torch.cuda.is_available():
        pytest.skip('for machines without a GPU')
    option = 'optim_wrapper.type=AmpOptimWrapper'
    words = ['aux.py', '--work-dir', 'run', '--cfg-options', option]
    assert train(words) == 0
    config = Config.fromfile('run/aux.py')
    assert config.optim_wrapper.type == 'mmauxq.CPUAmpOptimWrapper'
    words = ['--arms', f'a=aux.py,{option}', '--seeds', '0', '--out', 'out']
    assert compare_command(words) == 0
    assert (aux / 'out/runs/a/0/result.json').is_file()


def test_another_number_of_classes(aux, capfd):
    assert train(['float.py', '--work-dir', 'float']) == 0
    head = 'model.architecture.head.num_classes=4'
    start = 'float/epoch_1.pth'
    words = ['aux.py', '--work-dir', 'run', '--cfg-options', head]
    assert train([*words, f'load_from={start}']) == 2
    assert capfd.readouterr().err == (
        f'error: {start}: expected a checkpoint of this architecture '
        '(CIFARResNet), got one of another: head.fc.weight: expected shape '
        '(4, 16), got (3, 16), and 1 more; model.float_checkpoint takes a '
        'float checkpoint with another head\n'
    )
    assert train([*words, f'model.float_checkpoint={start}']) == 0


def test_a_backbone_without_a_head(aux, capfd):
    """As self-supervised training leaves it."""
    assert train(['float.py', '--work-dir', 'float']) == 0
    state = read_checkpoint('float/epoch_1.pth')['state_dict']
    only = {k: v for k, v in state.items() if k.startswith('backbone.')}
    torch.save(dict(state_dict=only), 'backbone.pth')
    options = ['--cfg-options', 'model.float_checkpoint=backbone.pth']
    assert train(['aux.py', '--work-dir', 'run', *options]) == 0
    shown = ''.join(capfd.readouterr())
    assert 'head.fc.weight is missing; it starts from random' in shown


def test_a_hook_that_wraps_the_model_for_a_test(aux, capfd):
    """MMEngine's ``PrepareTTAHook``, which wraps it as the test begins."""
    flips = "[dict(type='RandomFlip', prob=p) for p in (0.0, 1.0)]"
    (aux / 'mirrored.py').write_text(MIRRORED.replace('BASE', 'aux.py'))
    (aux / 'hook.py').write_text(
        "_base_ = 'mirrored.py'\n"
        "hook = dict(type='PrepareTTAHook', "
        "tta_cfg=dict(type='AverageClsScoreTTA'))\n"
        'custom_hooks = [hook]\n'
        "data = dict(type='Mirrored', pipeline=[dict(type='TestTimeAug', "
        f"transforms=[{flips}, [dict(type='PackInputs')]])])\n"
        'test_dataloader = dict(dataset=data)\n'
    )
    assert train(['mirrored.py', '--work-dir', 'run']) == 0
    found = []
    for config in ('mirrored.py', 'hook.py'):
        assert evaluate([config, 'run/slim.pth']) == 0
        found.append(json.loads(last_line(capfd)))
    assert found[0] == found[1]


def test_a_hook_that_objects_before_the_first_step(aux, capfd):
    """One line, not a traceback."""
    (aux / 'objects.py').write_text(
        'from mmengine.hooks import Hook\n'
        'from mmengine.registry import HOOKS\n'
        '@HOOKS.register_module(force=True)\n'
        'class Objects(Hook):\n'
        '    def before_train(self, runner):\n'
        "        raise AssertionError('the model is not the right one')\n"
    )
    (aux / 'hook.py').write_text(
        "_base_ = 'aux.py'\n"
        "custom_imports = dict(imports=['toyset', 'moresets', 'objects'])\n"
        "custom_hooks = [dict(type='Objects')]\n"
    )
    assert train(['hook.py', '--work-dir', 'run']) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert 'AssertionError: the model is not the right one' in line
