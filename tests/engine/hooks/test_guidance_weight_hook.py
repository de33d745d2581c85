import math
from types import SimpleNamespace

import pytest

from mmauxq.engine.hooks import GuidanceWeightHook
from mmauxq.errors import UsageError
from mmauxq.registry import HOOKS
from tests.networks import AUX, joint_qat


class _Hub:
    def __init__(self):
        self.scalars = {}

    def update_scalar(self, name, value):
        self.scalars[name] = value


def run(hook, model, iteration, of=100):
    runner = SimpleNamespace(
        model=model, iter=iteration, max_iters=of, message_hub=_Hub()
    )
    hook.before_train(runner)
    hook.before_train_iter(runner, iteration)
    return runner


@pytest.mark.parametrize(
    'shape, middle', [('linear', 0.6), ('cosine', 0.6), ('constant', 1.0)]
)
def test_shapes(shape, middle):
    hook = GuidanceWeightHook(end_weight=0.2, shape=shape)
    hook.start_weight = 1.0
    assert hook.weight(0) == 1
    assert hook.weight(0.5) == pytest.approx(middle)
    assert hook.weight(1) == pytest.approx(1 if shape == 'constant' else 0.2)


def test_cosine_follows_its_formula():
    hook = GuidanceWeightHook(begin=0.2, end=0.6)
    hook.start_weight = 2.0
    assert hook.weight(0.1) == 2
    assert hook.weight(0.3) == pytest.approx(1 + math.cos(math.pi / 4))
    assert hook.weight(0.9) == 0


def test_the_weight_of_the_module_changes_and_is_logged():
    model = joint_qat()
    runner = run(GuidanceWeightHook(shape='linear'), model, 25)
    assert model.guidance.loss_weight.item() == pytest.approx(0.75)
    assert runner.message_hub.scalars['train/guidance/weight'] == 0.75


def test_a_resumed_run_goes_on_where_it_was():
    """The weight depends on the iteration alone, not on what was before."""
    model = joint_qat()
    run(GuidanceWeightHook(), model, 60)
    expected = model.guidance.loss_weight.item()
    resumed = joint_qat()
    resumed.load_state_dict(model.state_dict())
    run(GuidanceWeightHook(), resumed, 60)
    assert resumed.guidance.loss_weight.item() == expected


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(shape='steep'), "one of constant, linear, cosine, got 'steep'"),
        (dict(begin=0.5, end=0.5), 'begin=0.5, end=0.5'),
        (dict(end=2), 'end=2'),
        (dict(end_weight=-1), 'end_weight: expected a finite number from 0, '),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        HOOKS.build(dict(type='mmauxq.GuidanceWeightHook', **settings))


def test_without_guidance_it_says_so():
    with pytest.raises(UsageError, match='the model has no guidance'):
        run(GuidanceWeightHook(), joint_qat(guidance=None), 1)


KD = dict(type='mmauxq.KnowledgeDistillation')


def test_one_of_several_guidances():
    model = joint_qat(guidance=[AUX, KD])
    runner = run(GuidanceWeightHook(shape='linear', index=1), model, 25)
    assert [g.loss_weight.item() for g in model.guidance] == [1, 0.75]
    assert runner.message_hub.scalars == {'train/guidance.1/weight': 0.75}


@pytest.mark.parametrize('index', [None, 2, -1])
def test_which_of_several_must_be_said(index):
    model = joint_qat(guidance=[AUX, KD])
    with pytest.raises(UsageError, match='index: expected 0 to 1, the guid'):
        run(GuidanceWeightHook(index=index), model, 25)
