"""What a user may get wrong: one line, status 2, nothing lost."""

import os

import pytest
import torch

from tests.commands import evaluate, train
from tests.crafted import CRAFTED

HEADLESS = "model = dict(type='ImageClassifier', backbone=dict(type='VGG'))"


class Evil:
    def __reduce__(self):
        return os.mkdir, ('ran',)


@pytest.fixture
def fails(project, capfd):
    """Runs a command that must fail in one line; returns the line."""

    def run(command, *args):
        assert command([str(a) for a in args]) == 2
        err = capfd.readouterr().err.splitlines()
        assert len(err) == 1, err
        assert err[0].startswith('error: ')
        return err[0]

    return run


def write(text, name='bad.py'):
    with open(name, 'w') as file:
        file.write(text)
    return name


@pytest.mark.parametrize(
    'text, message',
    [
        (None, 'bad.py does not exist'),
        ('model = dict(', 'SyntaxError'),
        ('x = undefined', 'NameError'),
        ('x = 1', 'has no `model`'),
        ('model = 3', 'has no `model`'),
        ('model = dict(head=1)', 'has no classifier'),
        (HEADLESS, 'has no classifier'),
        ('_base_ = "none.py"', 'none.py'),
        ('_base_ = "nopackage::_base_/x.py"', 'nopackage'),
        ('_base_ = "mmauxq::_base_/none.py"', 'none.py'),
        ('custom_imports = dict(imports=["nomodule"])', 'nomodule'),
        ("model = dict(type='X')", 'has no `train_dataloader`'),
    ],
)
def test_config(fails, text, message):
    if text is not None:
        write(text)
    assert message in fails(train, 'bad.py', '--work-dir', 'run')


@pytest.mark.parametrize(
    'option, message',
    [
        ('model.type=Nope', 'Nope is not in the mmpretrain::model registry'),
        ('model.head.type=Nope', 'Nope'),
        ('model.backbone.no_such=1', 'no_such'),
        ('train_dataloader.dataset.type=Nope', 'Nope'),
        ('optim_wrapper.optimizer.type=Nope', 'Nope'),
        ('param_scheduler.type=Nope', 'Nope'),
        ('val_evaluator.type=Nope', 'Nope'),
        ('load_from=none.pth', 'none.pth does not exist'),
        ('model', 'expected KEY=VALUE pairs'),
    ],
)
def test_cfg_options(fails, option, message):
    args = ['config.py', '--work-dir', 'run', '--cfg-options', option]
    assert message in fails(train, *args)


@pytest.mark.parametrize('command', [train, evaluate])
def test_arguments(fails, command):
    assert 'required: config' in fails(command)
    assert '--nope' in fails(command, 'config.py', 'x.pth', '--nope')


def test_work_dir(fails, project):
    (project / 'file').write_text('')
    line = fails(train, 'config.py', '--work-dir', 'file/run')
    assert 'work dir file/run cannot be written: Not a directory' in line


def test_out_file(fails, project):
    (project / 'file').write_text('')
    line = fails(evaluate, 'config.py', 'x.pth', '--out', 'file/m.json')
    assert '--out file/m.json cannot be written' in line


@pytest.mark.parametrize('kind', ['missing', 'cut', 'evil', 'folder', 'text'])
@pytest.mark.parametrize('command', ['test', 'resume', 'load_from'])
def test_checkpoint(fails, project, kind, command):
    path = project / 'c.pth'
    if kind == 'cut':
        torch.save({'state_dict': {'w': torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == 'evil':
        torch.save({'state_dict': {}, 'x': Evil()}, path)
    elif kind == 'folder':
        path.mkdir()
    elif kind == 'text':
        path.write_text('hello')
    if command == 'test':
        line = fails(evaluate, 'config.py', path, '--work-dir', 'run')
    elif command == 'resume':
        line = fails(train, 'config.py', '--work-dir', 'run', '--resume', path)
    else:
        line = fails(
            train, 'config.py', '--work-dir', 'run',
            '--cfg-options', f'load_from={path}',
        )  # fmt: skip
    assert str(path) in line
    assert not (project / 'ran').exists()


@pytest.mark.parametrize('command', ['test', 'resume', 'load_from'])
def test_crafted_checkpoints(fails, project, command):
    words = {
        'test': (evaluate, 'config.py', 'c.pth'),
        'resume': (train, 'config.py', '--resume', 'c.pth'),
        'load_from': (train, 'config.py', '--cfg-options', 'load_from=c.pth'),
    }
    for name, build in CRAFTED.items():
        (project / 'c.pth').write_bytes(build())
        assert 'checkpoint c.pth is ' in fails(*words[command]), name
        assert not (project / 'ran').exists(), name
        assert not list(project.glob('**/*.part')), name


@pytest.mark.parametrize('state', [{'w': torch.zeros(1)}, 'shape', 'type'])
def test_checkpoint_of_another_architecture(fails, project, state):
    if state == 'shape':
        state = {'head.fc.weight': torch.zeros(7, 8)}
    if state == 'type':
        state = {'head.fc.weight': torch.zeros(3, 8, dtype=torch.int64)}
    torch.save({'state_dict': state, 'meta': {}}, 'other.pth')
    line = fails(evaluate, 'config.py', 'other.pth', '--work-dir', 'run')
    assert 'other.pth is of another architecture' in line


def test_resume_with_nothing_there_keeps_the_start(project, capfd):
    """MMEngine would drop load_from and train from scratch."""
    args = ['config.py', '--work-dir', 'run']
    assert train(args) == 0
    args = ['config.py', '--work-dir', 'new', '--resume', '--cfg-options',
            'load_from=run/epoch_1.pth']  # fmt: skip
    capfd.readouterr()
    assert train(args) == 0
    out, err = capfd.readouterr()
    assert 'warning: no checkpoint to resume in new, starting fresh' in err
    assert 'Load checkpoint from run/epoch_1.pth' in out + err


def test_resume_in_a_moved_work_dir(project, capfd):
    assert train(['config.py', '--work-dir', 'run']) == 0
    os.rename('run', 'moved')
    args = ['config.py', '--work-dir', 'moved', '--resume', '--cfg-options',
            'train_cfg.max_epochs=2']  # fmt: skip
    assert train(args) == 0
    assert os.path.exists('moved/epoch_2.pth')


def test_training_errors_keep_their_traceback(project, capfd):
    args = ['config.py', '--work-dir', 'run', '--cfg-options',
            'train_dataloader.dataset.fail=True']  # fmt: skip
    assert train(args) == 1
    err = capfd.readouterr().err
    assert 'Traceback' in err and 'the data set broke' in err


def test_debug_shows_the_traceback(project, capfd):
    assert train(['none.py', '--debug']) == 2
    err = capfd.readouterr().err
    assert 'Traceback' in err and 'error: config none.py' in err


def test_missing_pkg_resources(fails, monkeypatch):
    import sys

    write('_base_ = "mmpretrain::_base_/default_runtime.py"')
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)
    import mmengine

    if not hasattr(mmengine.utils.package_utils, 'package2module'):
        pytest.skip('this mmengine needs no pkg_resources')
    try:
        line = fails(train, 'bad.py')
    except AssertionError:
        pytest.skip('this mmengine needs no pkg_resources')
    assert 'setuptools<82' in line or 'no `model`' in line
