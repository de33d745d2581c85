import logging

import torch

from mmauxq.engine.hooks.quantizer_watch_hook import DEAD
from mmauxq.quantizers import named_quantizers
from tests.networks import joint_qat
from tests.running import make_runner, with_validation

HOOK = dict(type='mmauxq.QuantizerWatchHook')


def test_scales_stay_positive_under_steps_that_throw_them_far(tmp_path):
    model = joint_qat()
    runner = make_runner(
        tmp_path,
        model=model,
        custom_hooks=[HOOK],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=100.0)),
    )
    thrown = []
    keep = type(runner).call_hook

    def call_hook(self, name, **kwargs):
        if name == 'after_train_iter':
            thrown.extend(
                (q.step <= 0).any().item() for _, q in named_quantizers(model)
            )
        keep(self, name, **kwargs)
        if name == 'after_train_iter':
            assert all((q.step > 0).all() for _, q in named_quantizers(model))

    runner.call_hook = call_hook.__get__(runner)
    runner.train()
    assert any(thrown)


def test_dead_quantizers_are_named(tmp_path, caplog):
    model = joint_qat()
    runner = make_runner(
        tmp_path, model=model, custom_hooks=[HOOK], **with_validation()
    )

    class Kill:
        priority = 95

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

        def after_train(self, *args):
            pass

        def before_val(self, runner):
            step = dict(named_quantizers(model))[name].step
            with torch.no_grad():
                step.fill_(1e6)

    names = [n for n, _ in named_quantizers(model)]
    name = next(n for n in names if n.endswith('input_quantizer'))
    runner._hooks.append(Kill())
    logging.getLogger().handlers.append(caplog.handler)
    runner.logger.addHandler(caplog.handler)
    runner.train()
    assert name in runner.message_hub.get_info(DEAD)
    line = next(r.message for r in caplog.records if 'are dead' in r.message)
    assert name in line and f'of {len(names)} quantizers' in line
    # nobody listens any more
    assert not any(q._forward_hooks for _, q in named_quantizers(model))


def test_living_quantizers_are_not(tmp_path):
    runner = make_runner(tmp_path, custom_hooks=[HOOK], **with_validation())
    runner.train()
    assert runner.message_hub.get_info(DEAD) == []
