"""What the options of the commands make of a config."""

import pytest
import torch
from mmengine.config import Config

from mmauxq.engine import launch


@pytest.mark.parametrize(
    'given, scale',
    [
        ({}, 'dynamic'),
        (dict(dtype='float16'), 'dynamic'),
        (dict(dtype='bfloat16'), dict(enabled=False)),
        (dict(dtype='bfloat16', loss_scale=512.0), 512.0),
    ],
)
def test_losses_are_scaled_where_gradients_would_vanish(
    monkeypatch, given, scale
):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    cfg = Config(dict(optim_wrapper=given))
    launch._set_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == scale


@pytest.mark.parametrize('option', ['--compile', '--cuda-graph'])
def test_forms_of_the_step_are_for_quantized_recipes(option, capsys, tmp_path):
    words = ['configs/float_r20_digits.py', '--work-dir', str(tmp_path)]
    assert launch.train([*words, option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: {option}: configs/float_r20_digits.py')
    assert 'allowed are recipes of mmauxq.JointQAT' in error
