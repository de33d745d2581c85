"""Loops and hooks that are put into a config."""

from mmengine.config import Config

from mmauxq.engine import defaults


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
