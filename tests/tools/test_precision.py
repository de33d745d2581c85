"""The precision of a training, as a config and the options choose it."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmauxq.checkpoint_file import read_checkpoint
from tests.commands import train
from tests.conftest import ROOT

IMAGENET = f"""
import time
_base_ = '{ROOT}/configs/aux_r18_w2a2.py'
experiment_name = f'imagenet_{{time.time_ns()}}'
custom_imports = dict(imports=['toyset', 'mmauxq'])
randomness = dict(seed=0)
model = dict(
    float_checkpoint=None,
    input_shape=(3, 8, 8),
    architecture=dict(
        backbone=dict(
            _delete_=True, type='mmauxq.CIFARResNet', depth=8,
            base_channels=4),
        head=dict(num_classes=3, in_channels=16, topk=(1, ))))
data_preprocessor = dict(num_classes=3)
loader = dict(
    _delete_=True, batch_size=4, num_workers=0, dataset=dict(type='ToySet'),
    sampler=dict(type='DefaultSampler', shuffle=True))
train_dataloader = loader
val_dataloader = loader
test_dataloader = loader
val_evaluator = dict(topk=(1, ))
test_evaluator = dict(topk=(1, ))
train_cfg = dict(max_epochs=1)
"""


def settled(checkpoint):
    """What a checkpoint holds of the network and the optimizer."""
    content = read_checkpoint(checkpoint)
    return content['state_dict'], content['optimizer']


def same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.fixture
def imagenet(project):
    """``imagenet.py``, a recipe for ImageNet made small."""
    (project / 'imagenet.py').write_text(IMAGENET)
    return project


def test_it_is_float32_on_a_cpu(imagenet, capfd):
    if torch.cuda.is_available():
        pytest.skip('for machines without a GPU')
    assert train(['imagenet.py', '--work-dir', 'auto']) == 0
    said = ''.join(capfd.readouterr())
    assert said.count('Precision: ') == 1
    assert 'Precision: float32, as no GPU here computes bfloat16' in said
    words = ['imagenet.py', '--work-dir', 'plain', '--no-amp']
    assert train(words) == 0
    assert 'Precision: ' not in ''.join(capfd.readouterr())
    config = Config.fromfile('plain/imagenet.py')
    assert config.optim_wrapper.type == 'OptimWrapper'
    same(settled('auto/epoch_1.pth'), settled('plain/epoch_1.pth'))


def test_amp_takes_its_place(imagenet, capfd):
    dtype = ['--cfg-options', 'optim_wrapper.dtype=bfloat16']
    words = ['imagenet.py', '--work-dir', 'run', '--amp', *dtype]
    assert train(words) == 0
    said = ''.join(capfd.readouterr())
    assert said.count('Precision: bfloat16 under autocast') == 1


@pytest.mark.parametrize(
    'first, second',
    [
        ([], ['--amp', '--cfg-options', 'optim_wrapper.dtype=float16']),
        (['--amp', '--cfg-options', 'optim_wrapper.dtype=float16'], []),
        (['--amp', '--cfg-options', 'optim_wrapper.dtype=bfloat16'], []),
        (
            ['--amp', '--cfg-options', 'optim_wrapper.dtype=bfloat16'],
            ['--amp', '--cfg-options', 'optim_wrapper.dtype=float16'],
        ),
        (['--no-amp'], []),
    ],
)
def test_a_run_goes_on_in_another_precision(imagenet, capfd, first, second):
    assert train(['imagenet.py', '--work-dir', 'run', *first]) == 0
    momenta = read_checkpoint('run/epoch_1.pth')['optimizer']['state']
    with (imagenet / 'imagenet.py').open('a') as file:
        file.write('train_cfg = dict(max_epochs=2)\n')
    words = ['imagenet.py', '--work-dir', 'run', '--resume', *second]
    assert train(words) == 0
    assert 'resumed epoch: 1, iter: 2' in ''.join(capfd.readouterr())
    last = read_checkpoint('run/epoch_2.pth')
    assert last['meta']['iter'] == 4
    assert last['optimizer']['state'].keys() == momenta.keys()


def test_mmpretrains_own_tool_has_it_too(imagenet, tool):
    import mmpretrain

    program = Path(mmpretrain.__file__).parent / '.mim/tools/train.py'
    if not program.is_file():
        pytest.skip('MMPretrain is installed without its tools')
    found = []
    plain = ['--cfg-options', 'optim_wrapper.type=OptimWrapper']
    for out, options, lines in (('auto', [], 1), ('plain', plain, 0)):
        words = ['imagenet.py', '--work-dir', out, '--no-persistent-workers']
        done = tool(str(program), *words, *options)
        assert done.returncode == 0, done.stderr
        assert (done.stdout + done.stderr).count('Precision: ') == lines
        found.append(settled(f'{out}/epoch_1.pth'))
    if not torch.cuda.is_available():
        same(*found)
