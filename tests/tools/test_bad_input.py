"""What a user may get wrong: one line, status 2, nothing lost."""

import os

import pytest
import torch

from tests.commands import (
    audit_command,
    evaluate,
    export_command,
    train,
)
from tests.support.crafted import CRAFTED, LEFT_OUT

CYCLE = """
from mmengine.registry import DATA_SAMPLERS
@DATA_SAMPLERS.register_module(force=True)
class Cycle:
    def __init__(self, **arguments): pass
    def __iter__(self):
        while True: yield from range(8)
    def __len__(self): return 8
"""
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
        ('raise SystemExit(0)', 'bad.py: SystemExit: 0'),
        ('raise KeyboardInterrupt', 'bad.py: KeyboardInterrupt'),
        ('x = 1\0', 'null bytes'),
        ('raise ValueError("\\x1b[1m\\u202e")', r'ValueError: \x1b[1m\u202e'),
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
        ('custom_hooks=[dict(type=A,rate=1)]', 'expected a dict as JSON'),
        ('custom_hooks=dict(type=A)', 'such as custom_hooks={"NAME": 1}'),
        ('model.head={"type": 1', 'or a value of it, such as model.head.NAME'),
        ('train_dataloader.sampler.type=InfiniteSampler', 'one that ends'),
        ('val_dataloader.sampler.type=InfiniteSampler', 'one that ends'),
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


def test_a_config_that_inherits_itself(run_python, tmp_path):
    """In a process of its own: MMEngine leaves a file open at each turn, of
    which there may be too many before there are too many turns."""
    path = write('_base_ = "bad.py"', tmp_path / 'bad.py')
    done = run_python('-m', 'mmauxq', 'train', path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f'error: config {path}: ')
    assert 'RecursionError' in line or 'Too many open files' in line


def test_a_sampler_that_never_ends(fails):
    write(CYCLE, 'endless.py')
    write(
        '_base_ = "config.py"\n'
        'custom_imports = dict(imports=["toyset", "endless"])\n'
        'train_dataloader = dict(sampler=dict(type="Cycle"))\n'
    )
    line = fails(train, 'bad.py', '--work-dir', 'run')
    assert 'end after the 2 batches of its length' in line


def test_no_batch(fails):
    options = ['batch_size=9', 'drop_last=True']
    options = [f'train_dataloader.{option}' for option in options]
    args = ['config.py', '--work-dir', 'run', '--cfg-options', *options]
    line = fails(train, *args)
    assert 'train_dataloader: expected at least one batch, got none' in line


def test_a_work_dir_that_is_no_text(fails, project):
    line = fails(train, 'config.py', '--work-dir', os.fsdecode(b'a\xff'))
    assert r'a\udcff: expected a path that is text in UTF-8' in line
    assert not list(project.glob('a*'))


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
        line = fails(*words[command])
        assert ('checkpoint c.pth is ' in line) != (name in LEFT_OUT), line
        assert 'c.pth' in line or 'checkpoint' in line, line
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
    assert 'other.pth: expected a checkpoint of this architecture' in line


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


# --- sections of this package, classes, checkpoints ------------------------

NETWORK = """
_base_ = ['mmauxq::_base_/networks/digits_r20.py',
          'mmauxq::_base_/aux_w2a2.py',
          'mmauxq::_base_/schedules/digits_w2a2.py']
model = dict(_delete_=True, architecture=_base_.model, **_base_.quantization)
model['architecture']['backbone']['depth'] = 8
train_cfg = dict(max_epochs=1)
import time
experiment_name = f'mine_{time.time_ns()}'
"""
FLOAT = """
_base_ = ['mmauxq::_base_/networks/digits_r20.py',
          'mmauxq::_base_/schedules/digits_float.py']
model = dict(backbone=dict(depth=8))
train_cfg = dict(max_epochs=1)
import time
experiment_name = f'float_{time.time_ns()}'
"""


@pytest.fixture
def recipes(project):
    """A downstream project, which has no file of ours."""
    write(NETWORK, 'mine.py')
    write(FLOAT, 'float.py')


@pytest.mark.parametrize(
    'option, message',
    [
        ('model.guidance.los_weight=0.3',
         'model.guidance: expected one of taps, loss_weight, width_ratio, '
         'groups, guides_student, separate_bn, dtype, init_cfg, got '
         "'los_weight'; did you mean loss_weight?"),
        ('model.quantizer.weight.bits=3', 'did you mean quantizers?'),
        ('model.quantizers.weigth.bits=3',
         'model.quantizers: expected one of weight, activation, got '
         "'weigth'; did you mean weight?"),
        ('model.quantizers.weight.bit=3',
         'model.quantizers.weight: expected one of bits, per_channel, got '
         "'bit'; did you mean bits?"),
        ('model.policy.frist=8',
         'model.policy: expected one of first, last, layers, got '
         "'frist'; did you mean first?"),
        ('model.guidance=aux',
         'model.guidance: expected a dict with `type`, a list of such dicts, '
         "or None, got 'aux'"),
        ('model.guidance.taps=backbone.nope',
         "guidance.taps: expected a pattern of names, got 'backbone.nope', "
            'which matches nothing; there are 3: backbone.layer1.0, '
            'backbone.layer2.0, backbone.layer3.0'),
        ('model.guidance.type=mmauxq.AuxAdaptor',
         'model.guidance.type: expected one of mmauxq.AutoAmpOptimWrapper, '
         'mmauxq.AuxAdaptorAggregator, '),
        ('model.input_shape=(3,8,8)', 'a forward pass on (1, 3, 8, 8) fails'),
        ('model.input_shape=8',
         'model.input_shape: expected three positive integers (C, H, W), '
         'got 8'),
        ('model.architecture.head.num_classes=2',
         'model.architecture.head.num_classes: expected 10, the classes of '
         'train_dataloader.dataset (0, 1, 2, 3, 4, ...), got 2'),
        ('data_preprocessor.mean=[1,2]',
         'train_dataloader.dataset: expected images on which the network '
         'runs, such as (1, 8, 8), got (2, 8, 8) after data_preprocessor='),
    ],
)  # fmt: skip
def test_sections_of_this_package(fails, recipes, option, message):
    args = ['mine.py', '--work-dir', 'run', '--cfg-options', option]
    assert message in fails(train, *args)


def test_more_classes_in_the_data_than_in_the_head(fails, project):
    args = ['--work-dir', 'run', '--cfg-options', 'model.head.num_classes=2']
    message = (
        'error: model.head.num_classes: expected 3, the classes of '
        '{}_dataloader.dataset (a, b, c), got 2'
    )
    assert fails(train, 'config.py', *args) == message.format('train')
    torch.save(dict(state_dict=two_classes()), 'two.pth')
    line = fails(evaluate, 'config.py', 'two.pth', *args)
    assert line == message.format('test')


def two_classes():
    from mmengine.config import Config
    from mmpretrain.registry import MODELS

    model = Config.fromfile('config.py').model
    model.head.num_classes = 2
    return MODELS.build(model).state_dict()


def test_more_classes_in_the_head_is_a_warning(project, capfd):
    args = ['config.py', '--work-dir', 'run', '--cfg-options']
    assert train([*args, 'model.head.num_classes=4']) == 0
    out, err = capfd.readouterr()
    said = [line for line in out.splitlines() if 'num_classes=4 is' in line]
    assert len(said) == 2  # training and validation data
    assert (
        'model.head.num_classes=4 is more than the 3 of the classes of '
        'train_dataloader.dataset (a, b, c)'
    ) in said[0]


def test_networks_of_ours_and_checkpoints_of_the_wrong_kind(
    recipes, fails, capfd
):
    assert train(['mine.py', '--work-dir', 'run']) == 0
    assert 'multiply-adds at (1, 8, 8)' in capfd.readouterr().out
    assert train(['float.py', '--work-dir', 'float']) == 0
    assert evaluate(['mine.py', 'run/slim.pth', '--work-dir', 'test']) == 0
    capfd.readouterr()
    message = (
        'float/epoch_1.pth: expected a quantized network, got a float one, '
        'without scales for 16 quantizers; train from it with '
        'model.float_checkpoint=float/epoch_1.pth, or test it with the '
        'config of the float network'
    )
    work_dir = ['--work-dir', 'test']
    for command, more in (
        (evaluate, work_dir),
        (audit_command, []),
        (export_command, ['--out', 'out']),
    ):
        assert message in fails(command, 'mine.py', 'float/epoch_1.pth', *more)
    line = fails(evaluate, 'float.py', 'run/slim.pth', *work_dir)
    assert line.startswith(
        'error: run/slim.pth: expected a float network, got a quantized one'
    )
    line = fails(
        train, 'mine.py', '--work-dir', 'run', '--cfg-options',
        'model.float_checkpoint=nowhere.pth',
    )  # fmt: skip
    assert 'nowhere.pth' in line


@pytest.mark.parametrize(
    'name, base',
    [
        ('conformer', 'conformer/conformer-tiny-p16_8xb128_in1k.py'),
        ('hrnet', 'hrnet/hrnet-w18_4xb32_in1k.py'),
    ],
)
def test_any_classifier_of_mmpretrain_passes_the_checks(
    fails, project, name, base
):
    """The data are not there; all checks before them pass."""
    write(
        f"_base_ = ['mmpretrain::{base}', 'mmauxq::_base_/aux_w4a4.py']\n"
        'model = dict(_delete_=True, architecture=_base_.model, '
        '**_base_.quantization)\n',
        'mine.py',
    )
    line = fails(train, 'mine.py', '--work-dir', 'run')
    assert line.startswith('error: train_dataloader.dataset={')
    assert 'imagenet' in line and 'FileNotFoundError' in line
