"""Loops, hooks and precision that are put into a config."""

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import AmpOptimWrapper

from mmauxq.engine import defaults

# It asks for the GPU when it is made, so before a GPU is feigned.
MMLogger.get_current_instance()


def test_loops_and_hooks_of_others_stay():
    hooks = dict(checkpoint=dict(type='CheckpointHook'), a=None)
    cfg = Config(
        dict(
            train_cfg=dict(type='Mine'),
            default_hooks=hooks,
            custom_hooks=[dict(type='EMAHook')],
        )
    )
    defaults.use_resumable_loop(cfg)
    assert cfg.train_cfg.type == 'Mine'
    assert cfg.default_hooks.checkpoint.type == 'mmauxq.SafeCheckpointHook'
    assert cfg.custom_hooks[0].type == 'EMAHook'
    for by_epoch, name in ((True, 'Epoch'), (False, 'Iter')):
        cfg = Config(dict(train_cfg=dict(by_epoch=by_epoch)))
        defaults.use_resumable_loop(cfg)
        assert cfg.train_cfg == dict(type=f'mmauxq.{name}Loop')
        cfg.train_cfg = dict(type=f'{name}BasedTrainLoop')
        defaults.use_resumable_loop(cfg)
        assert cfg.train_cfg == dict(type=f'mmauxq.{name}Loop')


def test_watch_hooks_are_added_once_and_keep_their_settings():
    mine = dict(type='mmauxq.FiniteNumbersHook', on_bad='skip')
    cfg = Config(dict(custom_hooks=[mine]))
    for _ in range(2):
        defaults.add_watch_hooks(cfg)
        assert list(cfg.custom_hooks) == [
            mine,
            dict(type='mmauxq.QuantizerWatchHook'),
        ]
    cfg = Config(dict())
    defaults.add_watch_hooks(cfg)
    assert [h.type for h in cfg.custom_hooks] == list(defaults.WATCHES)


def test_batches_are_stacked_where_nothing_else_is_said():
    for loop, loader, wanted in (
        ('mmauxq.EpochLoop', {}, dict(type='mmauxq.stacked_batch')),
        ('mmauxq.IterLoop', dict(collate_fn=len), len),
        ('Mine', {}, None),
    ):
        cfg = Config(dict(train_cfg=dict(type=loop), train_dataloader=loader))
        defaults.stack_batches(cfg)
        assert cfg.train_dataloader.get('collate_fn') == wanted
    cfg = Config(dict(train_cfg=None, train_dataloader=None))
    defaults.stack_batches(cfg)
    assert cfg.train_dataloader is None


@pytest.mark.parametrize(
    'given, scale',
    [
        ({}, 'dynamic'),
        (dict(dtype='float16'), 'dynamic'),
        (dict(dtype='bfloat16'), dict(enabled=False)),
        (dict(dtype=torch.bfloat16), dict(enabled=False)),
        (dict(dtype='bfloat16', loss_scale=512.0), 512.0),
    ],
)
def test_losses_are_scaled_where_gradients_would_vanish(
    monkeypatch, given, scale
):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    cfg = Config(dict(optim_wrapper=dict(given, type='AmpOptimWrapper')))
    defaults.fit_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == scale


def test_mixed_precision_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for kind, fits in (
        ('AmpOptimWrapper', 'mmauxq.CPUAmpOptimWrapper'),
        (AmpOptimWrapper, 'mmauxq.CPUAmpOptimWrapper'),
        ('mmauxq.AutoAmpOptimWrapper', 'mmauxq.AutoAmpOptimWrapper'),
        ('OptimWrapper', 'OptimWrapper'),
    ):
        cfg = Config(dict(optim_wrapper=dict(type=kind)))
        defaults.fit_amp(cfg)
        assert cfg.optim_wrapper == dict(type=fits)
