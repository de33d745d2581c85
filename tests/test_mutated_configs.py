"""Wrong configs end in one line; a fast part of tests/stress/configs.py."""

import logging

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.support import mutations


@pytest.fixture
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings('ignore')
@settings(
    max_examples=15,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@seed(7)
@given(mutation=mutations.mutations())
def test_trains_a_step_or_is_refused_in_one_line(
    tmp_path_factory, quiet, mutation
):
    folder = tmp_path_factory.mktemp('case')
    status, out = mutations.run(mutation, folder)
    verdict = mutations.verdict(mutation, status, out, folder)
    assert verdict in ('trained', 'refused'), f'{mutation}: {verdict}'


@pytest.mark.parametrize(
    'path, value, message',
    [
        # each was a traceback, or was taken for something else
        (
            'default_hooks.checkpoint.max_keep_ckpts',
            None,
            'expected an integer from -1, got None',
        ),
        ('train_dataloader.sampler', 'abc', 'expected a dict'),
        ('optim_wrapper.optimizer.lr', -0.5, 'optim_wrapper.optimizer='),
        ('model.quantizers', 3.0, "'weight' and 'activation'"),
        ('model.quantizers.activation', 0, '`type` and `bits`'),
        ('model.policy', -1, 'a dict or None'),
        ('model.guidance', [1], 'a list of such dicts, or None'),
        ('model.guidance', -1, 'a list of such dicts, or None'),
        ('model.guidance.type', [], 'guidance.type: expected'),
        ('model.guidance.taps', [-1], "'auto'"),
        ('model.guidance.loss_weight', float('nan'), 'a number from 0'),
        ('model.guidance.loss_weight', True, 'a number from 0'),
        ('custom_hooks.1.end', 'abc', 'finite number'),
        ('val_evaluator.topk', 0, 'an integer from 1'),
        ('val_dataloader.dataset.pipeline', [], 'PackInputs'),
        ('val_cfg', None, 'should be either all None or not None'),
        ('model.architecture', '8', 'config of a classifier'),
        ('train_dataloader', {}, 'has no `dataset`'),
        ('train_dataloader.sampler', {}, 'must contain the key "type"'),
        ('default_hooks.visualization', None, 'expected a dict'),
        ('default_hooks.checkpoint.save_best', 'top9', 'accuracy/top1'),
        ('default_hooks.checkpoint.no_such', 1, "got ['no_such']"),
        ('train_dataloader.dataset.no_such', 1, 'train_dataloader.dataset: '),
        ('model.architecture.backbone.depth', 9, 'expected one of 8, 14,'),
        ('param_scheduler.type', 'abc', 'param_scheduler'),
    ],
)
@pytest.mark.filterwarnings('ignore')
def test_what_was_found(tmp_path, quiet, path, value, message):
    keys = tuple(int(k) if k.isdigit() else k for k in path.split('.'))
    mutation = mutations.Mutation('aux', keys, 'set', value)
    status, out = mutations.run(mutation, tmp_path)
    assert status == 2, out[-2000:]
    assert mutations.verdict(mutation, status, out, tmp_path) == 'refused'
    errors = [s for s in out.splitlines() if s.startswith('error: ')]
    assert message in errors[0]


@pytest.mark.parametrize('kind', mutations.KINDS)
@pytest.mark.filterwarnings('ignore')
def test_the_recipes_themselves_train(tmp_path, quiet, kind):
    same = mutations.Mutation(kind, ('log_level',), 'set', 'ERROR')
    status, out = mutations.run(same, tmp_path)
    assert status == 0, out
    assert mutations.verdict(same, status, out, tmp_path) == 'trained'


@pytest.mark.parametrize('how', [mutations.REMOVE, mutations.RENAME])
@pytest.mark.filterwarnings('ignore')
def test_bits_are_not_forgotten_silently(tmp_path, quiet, how):
    path = ('model', 'quantizers', 'weight', 'bits')
    status, out = mutations.run(mutations.Mutation('qat', path, how), tmp_path)
    missing = 'did you mean bits' if how == mutations.RENAME else 'no `bits`'
    assert status == 2 and missing in out
