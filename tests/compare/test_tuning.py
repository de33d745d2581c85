"""What is tuned, on which images, and what is chosen."""

import json

import pytest
from mmengine.config import Config

from mmauxq.compare import comparison, tuning
from mmauxq.compare.arms import read_arms
from mmauxq.errors import UsageError
from tests.compare.conftest import record
from tests.conftest import ROOT

LR = 'optim_wrapper.optimizer.lr'
WIDTH = 'model.guidance.width_ratio'
QAT = ROOT / 'configs/qat_r8_w2a2_digits.py'
AUX = ROOT / 'configs/aux_r8_w2a2_digits.py'


@pytest.fixture
def arms():
    return read_arms([f'plain={QAT}', f'aux={AUX}'])


def test_the_words_of_the_command_line(arms):
    read = tuning.read_tuning(f'{LR}=1e-3,0.002,1', 7, [9], arms)
    assert read == tuning.Tuning(LR, (0.001, 0.002, 1), 7, (9,))
    assert list(read.arms(arms)) == ['plain', 'aux']
    names = tuning.read_tuning('log_level="INFO","A,B"', 7, [9], arms)
    assert names.values == ('INFO', 'A,B')
    width = tuning.read_tuning(f'{WIDTH}=0.5,1', 7, [9], arms)
    assert list(width.arms(arms)) == ['aux']


@pytest.mark.parametrize(
    'words, message',
    [
        (LR, 'expected KEY=V1,V2,... with numbers or strings of JSON, got'),
        ('=1,2', 'expected KEY=V1,V2'),
        (f'{LR}=', 'expected KEY=V1,V2'),
        (f'{LR}=1,', 'expected KEY=V1,V2'),
        (f'{LR}=1,x', 'expected KEY=V1,V2'),
        (f'{LR}=1,[2]', 'expected KEY=V1,V2'),
        (f'{LR}=1,null', 'expected KEY=V1,V2'),
        (f'{LR}=1,true', 'expected KEY=V1,V2'),
        (f'{LR}=1,NaN', 'expected KEY=V1,V2'),
        (f'{LR}=1e999,1', 'expected KEY=V1,V2'),
        (f'{LR}=0.1', 'expected at least two values, each once, got 0.1'),
        (f'{LR}=1,1.0', 'expected at least two values, each once, got 1,1.0'),
        ('optim_wrapper.optimizer.lrr=1,2', 'did you mean .*optimizer.lr?'),
        ('no.such.key=1,2', "expected one of .*, got 'no.such.key'"),
        ('train_cfg.max_epochs=1,2', 'which is part of the budget'),
        ('val_dataloader.batch_size=1,2', 'which is part of the budget'),
    ],
)
def test_wrong_words_are_one_line(arms, words, message):
    with pytest.raises(UsageError, match=f'^--tune: .*{message}') as error:
        tuning.read_tuning(words, 7, [9], arms)
    assert '\n' not in str(error.value)


def loaders(train, val):
    return Config(
        dict(train_dataloader=dict(dataset=train),
             val_dataloader=dict(dataset=val))
    )  # fmt: skip


def datasets(config):
    return config.train_dataloader.dataset, config.val_dataloader.dataset


def test_images_in_memory_are_held_out_inside():
    """Padding and flips stay where they are: outside."""
    train, test = (dict(type='CIFAR10', split=s) for s in ('train', 'test'))
    before = loaders(
        dict(type='mmauxq.InMemoryImages', dataset=train, padding=4),
        dict(type='mmauxq.InMemoryImages', dataset=test),
    )
    rest, held = datasets(tuning.hold_out(before, 7))
    inside = dict(type='mmauxq.HeldOut', dataset=train, count=7)
    assert rest == dict(type='mmauxq.InMemoryImages', padding=4,
                        dataset=dict(inside, part='rest'))  # fmt: skip
    assert held == dict(
        type='mmauxq.InMemoryImages', dataset=dict(inside, part='held_out')
    )
    assert before.train_dataloader.dataset.dataset == train


def test_other_images_get_the_pipeline_of_the_validation():
    """Inside of what repeats them, or one would be in both parts."""
    flips, packs = [dict(type='RandomFlip')], [dict(type='PackInputs')]
    train = dict(type='CIFAR10', split='train', pipeline=flips)
    test = dict(type='CIFAR10', split='test', pipeline=packs, test_mode=True)
    repeated = dict(type='RepeatDataset', times=3, dataset=train)
    rest, held = datasets(tuning.hold_out(loaders(repeated, test), 7))
    inside = dict(type='mmauxq.HeldOut', dataset=train, count=7)
    assert rest == dict(repeated, dataset=dict(inside, part='rest'))
    assert held == dict(inside, part='held_out', pipeline=packs)


def test_runs_with_each_value_and_the_best(arms, tmp_path):
    width = tuning.Tuning(LR, (0.02, 0.1, 0.4), 300, (1000, 1001))
    runs = width.plan(tmp_path, arms)
    assert [run.name for run in runs[:3]] == [
        f'plain {LR}=0.02 1000',
        f'aux {LR}=0.02 1000',
        f'plain {LR}=0.02 1001',
    ]
    assert runs[-1].folder == tmp_path / f'{LR}=0.4/runs/aux/1001'
    config = Config.fromfile(runs[-1].folder / 'recipe.py')
    assert config.optim_wrapper.optimizer.lr == 0.4
    for loader in (config.train_dataloader, config.val_dataloader):
        assert loader.dataset.dataset.count == 300
    finals = 90, 91, 80, 81, 92, 93, 84, 85, 96, 99, 80, 79
    for run, final in zip(runs, finals, strict=True):
        run.result.write_text(json.dumps(record(run.arm, run.seed, final)))
    metrics = width.metrics(tmp_path, arms)  # means of the seeds
    assert metrics == dict(plain=[85, 88, 88], aux=[86, 89, 89])
    chosen = width.choose(metrics)
    assert chosen == dict(plain=0.1, aux=0.1)  # the first of the best
    best = width.with_values(arms, chosen)
    assert best['aux'].optim_wrapper.optimizer.lr == 0.1
    assert arms['aux'].optim_wrapper.optimizer.lr == 0.05
    assert best['aux'].train_dataloader == arms['aux'].train_dataloader


def test_an_arm_without_the_setting_stays_as_it_is(arms, tmp_path):
    width = tuning.Tuning(WIDTH, (0.5, 1), 300, (1000,))
    runs = width.plan(tmp_path, arms)
    assert {run.arm for run in runs} == {'aux'}
    best = width.with_values(arms, {'aux': 0.5})
    assert best['plain'] is arms['plain']
    assert best['aux'].model.guidance.width_ratio == 0.5


@pytest.mark.parametrize(
    'ending',
    [
        'NaN or infinity, first in x',
        'bn1.running_var holds NaN or infinity; no checkpoint is written',
    ],
)
def test_a_value_with_which_training_diverges(arms, tmp_path, ending):
    """It has 0, and the others go on."""
    rates = tuning.Tuning(LR, (0.02, 9.0), 300, (1000,))
    good, bad = rates.plan(tmp_path, {'plain': arms['plain']})
    good.result.write_text(json.dumps(record('plain', 1000, 90.0)))
    log = f'mmauxq.errors.TrainingError: step 3: {ending}'
    (bad.folder / 'log.txt').write_text(log)
    comparison._check_finished(bad, may_diverge=True)
    assert comparison._is_finished(bad)
    metrics = rates.metrics(tmp_path, {'plain': arms['plain']})
    assert metrics == dict(plain=[90.0, 0.0])


@pytest.mark.parametrize(
    'key, values, images, message',
    [
        ('model.guidance.taps', ('auto', 'x'), 9, "arm 'aux': guidance.taps"),
        (LR, (1, 2), 1198, '--hold-out: .* less than 1198, .* got 1198'),
    ],
)
def test_what_cannot_be_built_is_told_before(
    arms, key, values, images, message
):
    with pytest.raises(UsageError, match=f'^{message}') as error:
        tuning.Tuning(key, values, images, (9,)).check(arms, {})
    assert '\n' not in str(error.value)


def test_a_rate_builds_no_model(arms, monkeypatch):
    """They were built before, and a rate does not change them."""
    built: list = []
    monkeypatch.setattr(tuning, 'check_arms', built.append)
    tuning.Tuning(LR, (1.0, 2.0), 100, (9,)).check(arms, {})
    assert not built
    values = ('auto', 'stage_ends')
    tuning.Tuning('model.guidance.taps', values, 100, (9,)).check(arms, {})
    assert [list(found) for found in built] == [['aux'], ['aux']]


def test_floats_of_other_images_are_refused(arms):
    """What is held out of them would not be what is held out of the arms."""
    config = ROOT / 'configs/float_r8_digits.py'
    floats = read_arms([f'float={config}'])
    source = floats['float'].train_dataloader.dataset.dataset
    rates = tuning.Tuning(LR, (1.0, 2.0), 100, (9,))
    source.pipeline = []
    rates.check(arms, floats)
    source.indices = 800
    with pytest.raises(UsageError, match='--hold-out: expected one training'):
        rates.check(arms, floats)


TUNED = dict(
    arms={},
    tuning=dict(key=LR, values=[0.1, 0.2, 0.4], hold_out=300, seeds=[7]),
    held_out=dict(plain=[90, 92, 91], aux=[93.125, 92, 91]),
    chosen=dict(plain=0.2, aux=0.1),
)


def test_the_table_says_what_was_chosen():
    lines = tuning.table(TUNED, 'top-1').splitlines()
    assert lines == [
        f'{LR}, by final top-1 on 300 images held out of training:',
        '',
        '| arm | 0.1 | 0.2 | 0.4 | chosen |',
        '| --- | --- | --- | --- | --- |',
        '| plain | 90.00 | 92.00 | 91.00 | 0.2 |',
        '| aux | 93.12 | 92.00 | 91.00 | 0.1 |',
        '',
        "warning: arm 'aux' is best at an end of its values, 0.1; one beyond "
        'it may be better',
        '',
        'warning: one seed on 300 images chooses nearly at random; '
        '--tune-seeds takes several',
    ]
    assert tuning.table(dict(arms={}), 'top-1') == ''
    more = dict(TUNED, tuning=dict(TUNED['tuning'], seeds=[7, 8]))
    first, *rest = tuning.table(more, 'top-1').splitlines()
    assert first == lines[0].replace('training:', 'training, mean of 2 seeds:')
    assert rest == lines[1:-2]
    many = dict(TUNED, tuning=dict(TUNED['tuning'], hold_out=1000))
    assert 'at random' not in tuning.table(many, 'top-1')
    names = dict(TUNED, tuning=dict(TUNED['tuning'], values=['a', 'b', 'c']))
    names['chosen'] = dict(plain='a', aux='c')
    assert 'at an end' not in tuning.table(names, 'top-1')


@pytest.mark.parametrize(
    'change',
    [
        dict(tuning=None),
        dict(tuning=[]),
        dict(tuning=dict(TUNED['tuning'], values=[[]])),
        dict(tuning=dict(TUNED['tuning'], values=[0.1, 0.2])),
        dict(tuning=dict(TUNED['tuning'], hold_out=0)),
        dict(tuning=dict(TUNED['tuning'], seeds=[])),
        dict(held_out=[]),
        dict(held_out=dict(plain=[90, 92, 91])),
        dict(held_out=dict(plain=[90, 92, 'x'], aux=[1, 2, 3])),
        dict(chosen=dict(plain=0.2, aux=3)),
    ],
)
def test_a_damaged_description_is_named(tmp_path, change):
    file = tmp_path / 'comparison.json'
    file.write_text(json.dumps(TUNED))
    assert comparison.describe(tmp_path) == TUNED
    file.write_text(json.dumps(TUNED | change))
    with pytest.raises(UsageError, match=f'^{file}: expected `tuning`, and'):
        comparison.describe(tmp_path)
