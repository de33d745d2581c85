"""What a checkpoint may hold, and that nothing else is believed."""

import copy
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.engine.resume import resume
from mmauxq.engine.training_state import Checked, checkpoint_name, plain
from mmauxq.errors import UsageError
from tests.networks import joint_qat
from tests.running import make_runner, state, with_validation

NAN = math.nan
SETTINGS = dict(
    **with_validation(),
    param_scheduler=[
        dict(type='LinearLR', start_factor=0.5, end=2, by_epoch=False),
        dict(type='MultiStepLR', milestones=[1, 2], by_epoch=True),
    ],
    default_hooks=dict(
        checkpoint=dict(
            type='mmauxq.SafeCheckpointHook',
            interval=1,
            save_best='accuracy/top1',
            max_keep_ckpts=2,
        ),
    ),
)


def runner_of(work_dir, optimizer=None, epochs=2):
    optimizer = optimizer or dict(type='SGD', lr=0.01, momentum=0.9)
    return make_runner(
        work_dir,
        train_cfg=dict(type='mmauxq.EpochLoop', max_epochs=epochs),
        optim_wrapper=dict(type='OptimWrapper', optimizer=optimizer),
        **SETTINGS,
    )


def unstarted(runner):
    """As ``Runner.train`` leaves a runner before it loads a checkpoint."""
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.param_schedulers = runner.build_param_scheduler(
        runner.param_schedulers
    )
    runner._resume = True
    return runner


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp('run')
    runner_of(folder).train()
    return folder


@pytest.fixture(scope='module')
def kept():
    """A runner for many tests; anew after one that used it."""
    return []


@pytest.fixture
def run(finished, kept):
    """A finished run, and one like it before its start."""
    if not kept or kept[0].iter:
        kept[:] = [unstarted(runner_of(finished))]
    return finished, kept[0]


def changed(content: dict, place: str, value) -> dict:
    """A copy with one value set; keys are joined by ``/``."""
    content = copy.deepcopy(content)
    *path, last = place.split('/')
    parent = content
    for key in path:
        parent = parent[int(key) if key.isdecimal() else key]
    last = int(last) if last.isdecimal() else last
    if value is REMOVE:
        del parent[last]
    elif callable(value):
        parent[last] = value(parent[last])
    else:
        parent[last] = value
    return content


REMOVE = object()
GROUP, STATE = 'optimizer/param_groups/0', 'optimizer/state/0'
LINEAR, STEPS = 'param_schedulers/0', 'param_schedulers/1'
INFO, LOG = 'message_hub/runtime_info', 'message_hub/log_scalars'
WRONG = [
    (f'{GROUP}/lr', '0.1'),
    (f'{GROUP}/lr', NAN),
    (f'{GROUP}/lr', -1.0),
    (f'{GROUP}/lr', None),
    (f'{GROUP}/lr', True),
    (f'{GROUP}/momentum', [0.9]),
    (f'{GROUP}/weight_decay', math.inf),
    (f'{GROUP}/nesterov', 3),
    (f'{GROUP}/initial_lr', {}),
    (f'{GROUP}/params', [0]),
    (f'{GROUP}/params', REMOVE),
    (GROUP, None),
    ('optimizer/param_groups', []),
    ('optimizer/param_groups', lambda groups: groups * 2),
    ('optimizer/param_groups', {'0': {}}),
    (f'{STATE}/momentum_buffer', torch.zeros(1)),
    (f'{STATE}/momentum_buffer', lambda t: t * NAN),
    (f'{STATE}/momentum_buffer', 'text'),
    (f'{STATE}/momentum_buffer', 1.0),
    (STATE, {'exp_avg': torch.zeros(1)}),
    (STATE, [1]),
    ('optimizer/state/99', {}),
    ('optimizer/state/x', {}),
    ('optimizer/state', []),
    ('optimizer', {}),
    (f'{LINEAR}/last_step', 'a'),
    (f'{LINEAR}/last_step', -1),
    (f'{LINEAR}/last_step', 0.5),
    (f'{LINEAR}/base_values', [NAN]),
    (f'{LINEAR}/base_values', [0.1] * 99),
    (f'{LINEAR}/base_values', 0.1),
    (f'{LINEAR}/start_factor', None),
    (f'{LINEAR}/param_name', 'momentum'),
    (f'{LINEAR}/by_epoch', 0),
    (f'{LINEAR}/foreign', 1),
    (f'{LINEAR}/optimizer', 1),
    (f'{LINEAR}/__class__', 'x'),
    (f'{STEPS}/milestones', [1]),
    (f'{STEPS}/milestones', {'a': 1}),
    (f'{STEPS}/milestones', {1: -1}),
    (f'{STEPS}/milestones', {1: 'x'}),
    (LINEAR, []),
    ('param_schedulers', []),
    ('param_schedulers', {'lr': []}),
    ('param_schedulers', REMOVE),
    (f'{INFO}/best_score', 'high'),
    (f'{INFO}/best_score', NAN),
    (f'{INFO}/best_score', torch.zeros(2)),
    (f'{INFO}/keep_ckpt_ids', 3),
    (f'{INFO}/keep_ckpt_ids', ['../x']),
    (f'{INFO}/keep_ckpt_ids', [-1]),
    (f'{INFO}/iter', -3),
    (f'{INFO}/epoch', 'x'),
    (f'{INFO}/max_iters', 0.5),
    (f'{INFO}/mmauxq~validated', []),
    (f'{LOG}/train~lr', None),
    (f'{LOG}/train~lr', {}),
    (f'{LOG}/train~lr/log', torch.zeros(2, 2)),
    (f'{LOG}/train~lr/log', torch.zeros(3)),
    (f'{LOG}/train~lr/max_length', 1),
    (f'{LOG}/train~lr/max_length', 'x'),
    ('state_dict/architecture.head.fc.weight', torch.zeros(1)),
    ('state_dict/architecture.head.fc.weight', lambda t: t * NAN),
    ('state_dict/architecture.head.fc.weight', REMOVE),
    ('gradients', {'architecture.head.fc.weight': torch.zeros(1)}),
    ('gradients', {'no.such': torch.zeros(1)}),
    ('gradients', 1),
    ('ema_state_dict', []),
    ('ema_state_dict', {'a': torch.tensor([NAN])}),
    ('meta/quantizer_bits', lambda bits: dict.fromkeys(bits, 7)),
    ('meta/epoch', True),
    ('meta/iter', 2**60),
    ('meta/iter', REMOVE),
    ('message_hub/resumed_keys', []),
]


@pytest.mark.parametrize(
    'case', range(len(WRONG)), ids=[place for place, _ in WRONG]
)
def test_a_wrong_value_is_refused_before_anything_is_used(run, case):
    folder, runner = run
    place, value = WRONG[case]
    content = read_checkpoint(folder / 'epoch_2.pth')
    content = (
        changed(content, place.replace('~', '\0'), value)
        if ('~' not in place)
        else changed_log(content, place, value)
    )
    path = folder / 'wrong.pth'
    torch.save(content, path)
    before = state(runner.model)
    with pytest.raises(UsageError) as caught:
        resume(runner, str(path))
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 500
    after = runner.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert runner.iter == 0 and not runner.optim_wrapper.optimizer.state
    assert runner.param_schedulers[0].last_step == 0


def changed_log(content: dict, place: str, value) -> dict:
    """As :func:`changed`, for keys with a slash, written as ``~``."""
    content = copy.deepcopy(content)
    keys = [key.replace('~', '/') for key in place.split('/')]
    parent = content
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = value
    return content


def test_an_honest_file_is_taken(run, tmp_path):
    """Also by one whose kernels differ, and with settings of another torch."""
    folder, _ = run
    content = read_checkpoint(folder / 'epoch_2.pth')
    for group in content['optimizer']['param_groups']:
        group.update(foreach='x', fused=3, no_such_setting=1)
    torch.save(content, tmp_path / 'epoch_2.pth')
    runner = unstarted(runner_of(tmp_path))
    resume(runner, str(tmp_path / 'epoch_2.pth'))
    assert (runner.epoch, runner.iter) == (2, 8)
    groups = runner.optim_wrapper.optimizer.param_groups
    assert groups[0]['foreach'] in (None, True, False)
    assert not groups[0]['fused'] and 'no_such_setting' not in groups[0]
    lr = runner.message_hub.log_scalars['train/lr']
    assert type(lr) is HistoryBuffer and len(lr.data[0]) == 8
    assert lr.data[0].dtype == np.float64
    again = runner.optim_wrapper.state_dict()['state']
    for index, values in content['optimizer']['state'].items():
        stored = values['momentum_buffer']
        assert torch.equal(stored, again[index]['momentum_buffer'])
    assert runner.param_schedulers[1].milestones == {1: 1, 2: 1}


def test_a_checkpoint_as_mmengine_writes_it(finished, tmp_path):
    """Those of earlier versions: objects, and paths of another machine."""
    content = read_checkpoint(finished / 'epoch_2.pth')
    hub = content['message_hub']
    log = hub['log_scalars']
    for name, entry in log.items():
        log[name] = HistoryBuffer(entry['log'].numpy(), entry['count'].numpy())
    info = hub['runtime_info']
    best = info['best_ckpt']
    info.update(
        last_ckpt='/elsewhere/run/epoch_2.pth',
        best_ckpt=f'/elsewhere/run/{best}',
        best_score=np.float64(info['best_score']),
    )
    steps = content['param_schedulers'][1]
    steps['milestones'] = Counter(steps['milestones'])
    del content['meta']['quantizer_bits']
    path = tmp_path / 'epoch_2.pth'
    torch.save(content, path)
    runner = unstarted(runner_of(tmp_path))
    resume(runner, str(path))
    info = runner.message_hub.runtime_info
    assert (runner.iter, info['best_ckpt']) == (8, best)
    assert 'train/lr' not in runner.message_hub.log_scalars  # left out
    assert runner.param_schedulers[1].milestones == {1: 1, 2: 1}


@pytest.mark.parametrize(
    'kind',
    [
        'AdamW',
        'Adam',
        'RMSprop',
        'Adagrad',
        'Adamax',
        'NAdam',
        'Lamb',
        'LARS',
    ],
)
def test_optimizers_come_back(tmp_path, kind):
    """What each keeps of a parameter is known from a trial of it."""
    optimizer = dict(type=kind, lr=0.001)
    if kind == 'LARS':
        optimizer['momentum'] = 0.9
    runner_of(tmp_path, optimizer, epochs=1).train()
    path = tmp_path / 'epoch_1.pth'
    runner = unstarted(runner_of(tmp_path, optimizer))
    resume(runner, str(path))
    stored = read_checkpoint(path)['optimizer']['state']
    own = runner.optim_wrapper.state_dict()['state']
    assert stored.keys() == own.keys() and len(own) > 10
    for index, values in stored.items():
        assert values.keys() == own[index].keys() and values
        for key, value in values.items():
            assert torch.equal(
                torch.as_tensor(value), torch.as_tensor(own[index][key])
            ), key


def test_a_checkpoint_holds_plain_values(run):
    """Any ``weights_only`` reader takes it, with nothing on its list."""
    folder, _ = run
    kinds = set()

    def collect(value) -> None:
        kinds.add(type(value))
        if isinstance(value, dict):
            kinds.update(map(type, value))
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for inner in value:
                collect(inner)

    with torch.serialization.safe_globals([]):
        torch.serialization.clear_safe_globals()
        content = torch.load(folder / 'epoch_2.pth', weights_only=True)
    assert type(content.pop('state_dict')).__name__ == 'OrderedDict'
    collect(content)
    assert kinds <= {dict, list, tuple, str, int, float, bool, torch.Tensor,
                     type(None)}  # fmt: skip
    info = content['message_hub']['runtime_info']
    assert info['last_ckpt'] == 'epoch_2.pth'
    assert info['best_ckpt'].startswith('best_accuracy_top1_epoch_')
    assert '/' not in info['best_ckpt']


def test_a_config_in_a_file_is_not_run(finished, tmp_path, monkeypatch):
    """MMEngine would run it."""
    monkeypatch.chdir(tmp_path)
    content = read_checkpoint(finished / 'epoch_2.pth')
    content['meta']['config'] = "import os\nos.mkdir('ran')\n"
    torch.save(content, 'epoch_2.pth')
    runner = unstarted(runner_of(tmp_path))
    resume(runner, 'epoch_2.pth')
    assert runner.iter == 8 and not Path('ran').exists()


FOREIGN = [
    '/etc',
    '../..',
    '/etc/passwd',
    'keep.txt',
    '',
    7,
    None,
    ['a'],
    'best_x_epoch_1.pth/..',
    '/a/b/.pth',
    '/a/.hidden.pth',
    'epoch_1.pth\0',
]


@pytest.mark.parametrize('stored', FOREIGN)
def test_paths_of_a_file_are_names_or_nothing(stored):
    assert checkpoint_name(stored) is None


@pytest.mark.parametrize('stored', [*FOREIGN, 'epoch_1.pth', '/a/slim.pth'])
def test_only_a_best_checkpoint_may_be_removed(stored):
    assert checkpoint_name(stored, 'best_ckpt') is None
    name = 'best_accuracy_top1_epoch_3.pth'
    assert checkpoint_name(f'/a/{name}', 'best_ckpt_accuracy/top1') == name


@pytest.mark.parametrize(
    'stored, name',
    [
        ('/home/a/run/epoch_3.pth', 'epoch_3.pth'),
        ('../iter_30.pth', 'iter_30.pth'),
        ('/a/of my own, 3.pth', 'of my own, 3.pth'),
        ('best_accuracy_top1_epoch_3.pth', 'best_accuracy_top1_epoch_3.pth'),
    ],
)
def test_names_of_checkpoints(stored, name):
    assert checkpoint_name(stored) == name


@pytest.mark.parametrize(
    'stored', ['/{}', '../foreign', '{}/keep.txt', '{}/epoch_1.pth']
)
def test_nothing_foreign_is_removed(tmp_path, stored):
    """The next better validation used to remove what the file names."""
    foreign = tmp_path / 'foreign'
    foreign.mkdir()
    for name in ('keep.txt', 'epoch_1.pth', 'best_x_epoch_1.pth'):
        (foreign / name).write_text('mine')
    runner_of(tmp_path / 'run', epochs=1).train()
    path = tmp_path / 'run/epoch_1.pth'
    content = read_checkpoint(path)
    info = content['message_hub']['runtime_info']
    info.update(best_ckpt=stored.format(foreign), best_score=-1.0)
    info['last_ckpt'] = info['best_ckpt']
    torch.save(content, path)
    runner = runner_of(tmp_path / 'run', epochs=3)
    runner._resume, runner._load_from = True, str(path)
    runner.train()
    assert runner.iter == 12
    assert len(list(foreign.iterdir())) == 3


def test_a_run_continued_elsewhere_leaves_the_first_one_alone(tmp_path):
    first, second = tmp_path / 'A', tmp_path / 'B'
    runner_of(first).train()
    content = read_checkpoint(first / 'epoch_2.pth')
    content['message_hub']['runtime_info']['best_score'] = -1.0
    torch.save(content, first / 'epoch_2.pth')
    files = sorted(p.name for p in first.glob('*.pth'))
    assert any(name.startswith('best') for name in files)
    runner = runner_of(second, epochs=4)
    runner._resume, runner._load_from = True, str(first / 'epoch_2.pth')
    runner.train()
    assert sorted(p.name for p in first.glob('*.pth')) == files
    assert sorted(p.name for p in second.glob('epoch*')) == [
        'epoch_3.pth',
        'epoch_4.pth',
    ]
    best = read_checkpoint(second / 'epoch_4.pth')['message_hub']
    assert Path(second, best['runtime_info']['best_ckpt']).is_file()


class Unknown:
    pass


def test_plain_values(caplog):
    value = {
        'numbers': (np.float64(0.5), np.int64(3), np.bool_(True)),
        'array': np.arange(3),
        'log': HistoryBuffer([1.0, 2.0], [1, 1]),
        'objects': [Unknown(), np.array(['a'])],
        3: 'x',
    }
    result = plain(value, 'meta')
    assert result['numbers'] == (0.5, 3, True)
    assert list(map(type, result['numbers'])) == [float, int, bool]
    assert result['array'].tolist() == [0, 1, 2]
    assert result['log']['log'].tolist() == [1.0, 2.0]
    assert result['objects'] == [None, None] and result[3] == 'x'


def test_the_message_says_what_would_help():
    error = Checked('a.pth').wrong('optimizer.lr', 'a number', 'x')
    assert str(error) == (
        "checkpoint a.pth: optimizer.lr: expected a number, got 'x'; start "
        'from its weights with load_from in place of resuming'
    )


def test_bits_of_another_config(tmp_path):
    from mmauxq.network.checkpoint import bits_of, check_same_bits

    network = joint_qat().architecture
    bits = bits_of(network)
    assert bits and set(bits.values()) <= set(range(1, 33))
    check_same_bits(network, dict(quantizer_bits=bits), 'a.pth')
    check_same_bits(network, {}, 'a.pth')
    check_same_bits(network, None, 'a.pth')
    bits[next(iter(bits))] = 10**11
    with pytest.raises(UsageError, match='bits, as the config says, got 1000'):
        check_same_bits(network, dict(quantizer_bits=bits), 'a.pth')
