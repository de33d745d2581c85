"""What the options of the commands make of a config."""

import argparse

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmauxq.cli import train as command
from mmauxq.engine.optimizers import AutoAmpOptimWrapper
from mmauxq.errors import UsageError
from tests.commands import train
from tests.networks import captured

# It asks for the GPU when it is made, so before a GPU is feigned.
MMLogger.get_current_instance()


AUTO = 'mmauxq.AutoAmpOptimWrapper'


@pytest.mark.parametrize(
    'words, given, expected',
    [
        ([], dict(type=AUTO), dict(type=AUTO)),
        ([], dict(), dict()),
        (['--amp'], dict(), dict(type='AmpOptimWrapper')),
        (
            ['--amp'],
            dict(type=AUTO, dtype='bfloat16'),
            dict(type='AmpOptimWrapper', dtype='bfloat16'),
        ),
        (['--no-amp'], dict(), dict(type='OptimWrapper')),
        (['--no-amp'], dict(type=AUTO), dict(type='OptimWrapper')),
        (
            ['--no-amp'],
            dict(type=AutoAmpOptimWrapper, clip_grad=dict(max_norm=1.0)),
            dict(type='OptimWrapper', clip_grad=dict(max_norm=1.0)),
        ),
        (
            ['--no-amp'],
            dict(type='AmpOptimWrapper', dtype='float16', loss_scale=2.0),
            dict(type='OptimWrapper'),
        ),
        (['--no-amp'], None, None),  # refused when settings are checked
    ],
)
def test_the_precision(words, given, expected):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    cfg = Config(dict(optim_wrapper=given))
    command._set_precision(cfg, parser.parse_args(['c.py', *words]).amp)
    assert cfg.optim_wrapper == expected


def test_no_amp_knows_what_it_takes_out():
    cfg = Config(dict(optim_wrapper=dict(type='ApexOptimWrapper')))
    with pytest.raises(
        UsageError,
        match='^--no-amp: optim_wrapper.type: expected one of OptimWrapper, '
        "AmpOptimWrapper, .*, got 'ApexOptimWrapper'",
    ):
        command._set_precision(cfg, False)


def test_the_log_names_the_precision_of_mmengines_wrapper():
    for settings, line in (
        (dict(type='AmpOptimWrapper'), ['Precision: float16 under autocast']),
        (
            dict(type='AmpOptimWrapper', dtype=torch.bfloat16),
            ['Precision: bfloat16 under autocast'],
        ),
        (dict(type=AUTO), []),  # says it itself
        (dict(), []),
    ):
        with captured() as messages:
            command._log_amp(Config(dict(optim_wrapper=settings)))
        assert [m.partition(';')[0] for m in messages] == line


@pytest.mark.parametrize(
    'optimizer, gpu, fused',
    [
        (dict(type='SGD', lr=0.1), True, True),
        (dict(type=torch.optim.AdamW), True, True),
        (dict(type='SGD', lr=0.1), False, None),  # nothing is recorded there
        (dict(type='SGD', lr=0.1, fused=False), True, False),
        (dict(type='SGD', lr=0.1, foreach=True), True, None),
        (dict(type='mmpretrain.Lamb'), True, None),  # has none
    ],
)
def test_a_recorded_step_has_a_fused_optimizer(
    monkeypatch, optimizer, gpu, fused
):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    cfg = Config(dict(model={}, optim_wrapper=dict(optimizer=optimizer)))
    command._fuse_optimizer(cfg)
    assert cfg.optim_wrapper.optimizer.get('fused') is fused


@pytest.mark.parametrize(
    'options, speed, expected, fused',
    [
        ([], None, None, True),
        ([], 'auto', 'auto', True),
        ([], 'eager', 'eager', False),
        ([], 'fast', 'fast', False),  # refused when the model is built
        ([], dict(memory='codes'), dict(memory='codes'), True),
        ([], dict(cuda_graph=False), dict(cuda_graph=False), False),
        ([], dict(compile=True), dict(compile=True), False),
        (['--eager'], dict(memory='codes'), 'eager', False),
        (
            ['--cuda-graph'],
            dict(memory='codes'),
            dict(memory='codes', cuda_graph=True),
            True,
        ),
        (['--cuda-graph'], 'eager', dict(cuda_graph=True), True),
        (['--compile'], None, dict(compile=dict(mode='default')), False),
    ],
)
def test_the_form_of_the_step(monkeypatch, options, speed, expected, fused):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    cfg = Config(
        dict(
            model=dict(speed=speed),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        )
    )
    args = parser.parse_args(['config.py', *options])
    command._set_speed(cfg, args, joint=True)
    assert cfg.model.speed == expected
    assert cfg.optim_wrapper.optimizer.get('fused', False) is fused


def test_one_form_of_the_step_at_a_time(capsys):
    assert train(['config.py', '--eager', '--cuda-graph']) == 2
    message = 'argument --cuda-graph: not allowed with argument --eager'
    assert message in capsys.readouterr().err


def test_the_optimizer_to_be_fused_must_exist(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    cfg = Config(
        dict(model={}, optim_wrapper=dict(optimizer=dict(type='SDG')))
    )
    with pytest.raises(UsageError, match="optimizer 'SDG' is not registered"):
        command._fuse_optimizer(cfg)


@pytest.mark.parametrize('option', ['--compile', '--cuda-graph', '--eager'])
def test_forms_of_the_step_are_for_quantized_recipes(option, capsys, tmp_path):
    words = ['configs/float_r20_digits.py', '--work-dir', str(tmp_path)]
    assert train([*words, option]) == 2
    error = capsys.readouterr().err
    assert error == (
        f'error: {option}: expected a recipe of mmauxq.JointQAT, got '
        'configs/float_r20_digits.py, which trains ImageClassifier\n'
    )


def test_modules_of_the_current_folder_are_found(run_python, root, tmp_path):
    (tmp_path / 'own_net.py').write_text('open("imported", "w").close()')
    (tmp_path / 'config.py').write_text(
        f'_base_ = {str(root / "configs/qat_r8_w2a2_digits.py")!r}\n'
        "custom_imports = dict(imports=['own_net'])\n"
        'model = dict(bits=2)\n'
    )
    done = run_python(root / 'tools/train.py', 'config.py')
    assert done.returncode == 2
    assert "got 'bits'" in done.stderr  # a key that is found out later
    assert (tmp_path / 'imported').exists()
