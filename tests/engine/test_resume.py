"""A run that is killed and resumed ends as the one that never was."""

import os
from pathlib import Path

import pytest
import torch

import mmauxq.algorithms  # noqa: F401  (before anything is forked)
from mmauxq import compat
from mmauxq.engine import resume
from mmauxq.errors import UsageError
from tests.conftest import ROOT
from tests.support import killing

SMALL = """
_base_ = ['{recipe}']
experiment_name = '{name}'
randomness = dict(seed=5)
model = dict(
    architecture=dict(
        backbone=dict(depth=8, base_channels=4), head=dict(in_channels=16)
    )
)
train_dataloader = dict(batch_size=32, dataset=dict(indices=128))
val_dataloader = dict(dataset=dict(indices=64))
train_cfg = dict(max_epochs=3)
param_scheduler = dict(T_max=3)
default_hooks = dict(logger=dict(interval=1))
"""
BY_ITERATION = """
train_cfg = dict(
    _delete_=True, by_epoch=False, max_iters=12, val_interval=4)
param_scheduler = dict(
    _delete_=True, type='CosineAnnealingLR', T_max=12, by_epoch=False)
"""
IN_BETWEEN = """
default_hooks['checkpoint'] = dict(
    interval=3, by_epoch=False, max_keep_ckpts=1)
"""
EMA = "custom_hooks = [dict(type='EMAHook', momentum=0.1)]\n"
WEIGHT = (
    "custom_hooks = [dict(type='mmauxq.GuidanceWeightHook', end_weight=0.1)]\n"
)
RATES = (
    "custom_hooks = [dict(type='mmauxq.TransitionRateScheduleHook',"
    ' gain=0.3)]\n'
)
FREEZING = (
    "custom_hooks = [dict(type='mmauxq.OscillationFreezingHook',"
    ' start=0.3, end=0.1, momentum=0.5)]\n'
)
GUESSING = "model['guidance'] = dict(least_accuracy=0)\n"
ACCUMULATE = 'optim_wrapper = dict(accumulative_counts=3)\n'
AMP = (
    "optim_wrapper = dict(type='mmauxq.CPUAmpOptimWrapper', dtype='float16',\n"
    '    loss_scale=dict(init_scale=2.0**30, growth_interval=2))\n'
)
"""Steps that overflow are among the first, and a scale that changes."""

pytestmark = pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')


@pytest.fixture(autouse=True)
def loader():
    compat.enable_safe_checkpoints()


def write_config(folder: Path, kind: str, more: str = '') -> Path:
    path = folder / f'{kind}.py'
    path.write_text(
        SMALL.format(
            recipe=ROOT / f'configs/{kind}_r20_w2a2_digits.py',
            name=f'{kind}_{folder.name}',
        )
        + more
    )
    return path


def last(work_dir: Path) -> Path:
    return Path((work_dir / 'last_checkpoint').read_text())


@pytest.mark.parametrize(
    'kind, more, points',
    [
        ('qat', '', [killing.at_step(6), killing.in_validation(1)]),
        ('dsn', '', [killing.in_validation(2)]),
        ('bwr', GUESSING, [killing.at_step(6)]),
        ('aux', WEIGHT, [killing.at_step(3), killing.at_step(11)]),
        ('aux', EMA + AMP, [killing.at_step(9)]),
        ('dsn', IN_BETWEEN, [killing.at_step(5), killing.at_step(8)]),
        ('aux', BY_ITERATION + IN_BETWEEN, [killing.at_step(11)]),
        ('qat', ACCUMULATE + IN_BETWEEN, [killing.at_step(10)]),
        ('qat', ACCUMULATE, [killing.at_step(5)]),
        ('qat', RATES + AMP + IN_BETWEEN, [killing.at_step(8)]),
        ('qat', FREEZING + AMP + IN_BETWEEN, [killing.at_step(8)]),
        (
            'qat',
            '',
            [
                killing.in_write(0, 'half'),  # epoch_1
                killing.in_write(1, 'half'),  # the pointer
                killing.in_write(0, 'before rename'),  # the best
            ],
        ),
    ],
    ids=[
        'qat', 'last validation, the best', 'blocks', 'weight schedule',
        'ema and amp', 'within an epoch', 'by iteration',
        'gradients within an epoch', 'gradients', 'transition rates',
        'oscillations', 'within files',
    ],
)  # fmt: skip
def test_killed_and_resumed_is_bit_equal(tmp_path, kind, more, points):
    config, log = write_config(tmp_path, kind, more), tmp_path / 'log'
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    status = killing.run_train([config, '--work-dir', whole], log)
    assert status == 0, log.read_text()[-3000:]
    words = [config, '--work-dir', killed, '--resume']
    for point in points:
        assert killing.run_train(words, log, point) == -9
    assert killing.run_train(words, log) == 0, log.read_text()[-3000:]
    assert last(killed).name == last(whole).name
    assert killing.differences(last(whole), last(killed)) == []
    best = [next(d.glob('best*.pth'), None) for d in (whole, killed)]
    if best[0]:
        assert best[0].name == best[1].name


def test_the_comparison_sees_what_mmengine_loses(tmp_path):
    """If this fails, MMEngine resumes exactly and the loops can go."""
    config, log = write_config(tmp_path, 'qat', IN_BETWEEN), tmp_path / 'log'
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'

    def plain(point=lambda: None):
        def prepare():
            from mmauxq.engine import defaults

            defaults.use_resumable_loop = lambda cfg: None
            point()

        return prepare

    def die_late():
        from mmengine.runner import EpochBasedTrainLoop

        before = EpochBasedTrainLoop.run_iter

        def run_iter(self, *args):
            if self._iter == 5:
                killing.die()
            before(self, *args)

        EpochBasedTrainLoop.run_iter = run_iter

    words = [config, '--work-dir', killed, '--resume']
    whole_words = [config, '--work-dir', whole]
    assert killing.run_train(whole_words, log, plain()) == 0
    assert killing.run_train(words, log, plain(die_late)) == -9
    assert killing.run_train(words, log, plain()) == 0
    assert killing.differences(last(whole), last(killed))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize('form', [[], ['--cuda-graph']])
def test_float16_with_a_loss_scaler_is_bit_equal(tmp_path, run_python, form):
    """In a process of its own: CUDA cannot be used before a fork."""
    config = write_config(
        tmp_path, 'aux', 'randomness = dict(seed=5, deterministic=True)\n'
    )
    whole, killed, log = (tmp_path / n for n in ('whole', 'killed', 'log'))
    done = run_python(
        '-c',
        'import mmauxq.algorithms\n'
        'from pathlib import Path\n'
        'from tests.support import killing\n'
        f'log = Path({str(log)!r})\n'
        f'words = [{str(config)!r}, "--amp", *{form}, "--work-dir"]\n'
        f'run = killing.run_train\n'
        f'print(run([*words, {str(whole)!r}], log))\n'
        f'words = [*words, {str(killed)!r}, "--resume"]\n'
        'print(run(words, log, killing.at_step(6)), run(words, log))\n',
        # asking the driver whether there is a GPU would be a first use
        env=dict(
            CUBLAS_WORKSPACE_CONFIG=':4096:8',
            PYTORCH_NVML_BASED_CUDA_CHECK='1',
        ),
        cwd=ROOT,
    )
    text = log.read_text() if log.exists() else ''
    assert done.stdout.split() == ['0', '-9', '0'], text[-3000:]
    first = killing.content(last(whole))
    assert any('loss_scaler' in name for name in first)
    # what the GPU says of its memory is no part of the promise
    differing = killing.differences(last(whole), last(killed))
    assert [n for n in differing if 'memory' not in n] == []


# --- which checkpoint ------------------------------------------------------


def save(path: Path, steps: int = 1, **more) -> Path:
    hub = dict(log_scalars={}, runtime_info={}, resumed_keys={})
    checkpoint = dict(
        meta=dict(epoch=steps, iter=steps, seed=7),
        state_dict=dict(w=torch.zeros(1)),
        message_hub=hub,
        optimizer=dict(state={}),
    )
    torch.save({**checkpoint, **more}, path)
    return path


def test_damaged_checkpoints_are_named_and_skipped(tmp_path, capfd):
    good = save(tmp_path / 'epoch_2.pth', 2)
    os.utime(save(tmp_path / 'epoch_1.pth', 1), (1, 1))
    for name in ('epoch_3.pth', 'epoch_4.pth'):
        data = save(tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    (tmp_path / 'epoch_5.pth.part').write_bytes(b'PK')
    torch.save({'state_dict': {}}, tmp_path / 'slim.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_4.pth'))
    path, checkpoint = resume.find_checkpoint(tmp_path)
    assert Path(path) == good and checkpoint['meta']['iter'] == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and all('skipped' in line for line in lines)
    assert 'epoch_5.pth.part is incomplete' in lines[0]
    assert 'epoch_4.pth is truncated' in lines[1]
    assert 'epoch_3.pth is truncated' in lines[2]


@pytest.mark.parametrize('pointer', ['', 'nowhere.pth', '\x00\xff'])
def test_a_useless_pointer(tmp_path, pointer):
    save(tmp_path / 'iter_9.pth')
    (tmp_path / 'last_checkpoint').write_text(pointer)
    assert resume.find_checkpoint(tmp_path)[0].endswith('iter_9.pth')


def test_the_pointer_decides_over_leftovers_of_an_older_run(tmp_path):
    save(tmp_path / 'epoch_20.pth')
    save(tmp_path / 'epoch_3.pth')
    (tmp_path / 'last_checkpoint').write_text('epoch_3.pth')
    assert resume.find_checkpoint(tmp_path)[0].endswith('epoch_3.pth')


def test_without_a_pointer_the_highest_step_counts(tmp_path):
    for step, time in ((9, 30), (10, 20), (2, 40)):
        os.utime(save(tmp_path / f'epoch_{step}.pth', step), (time, time))
    os.utime(save(tmp_path / 'iter_99.pth', 99), (1, 1))  # of an older run
    assert resume.find_checkpoint(tmp_path)[0].endswith('epoch_10.pth')


def test_a_pointer_leads_nowhere_else(tmp_path):
    """A copied run goes on from its own files."""
    first, second = tmp_path / 'first', tmp_path / 'second'
    for folder in (first, second):
        folder.mkdir()
        save(folder / 'epoch_2.pth', 2)
        (folder / 'last_checkpoint').write_text(str(first / 'epoch_2.pth'))
    path, _ = resume.find_checkpoint(second)
    assert Path(path) == second / 'epoch_2.pth'


def test_what_is_no_file_is_passed_over(tmp_path):
    good = save(tmp_path / 'epoch_1.pth')
    os.mkfifo(tmp_path / 'epoch_9.pth')
    (tmp_path / 'epoch_8.pth').mkdir()
    (tmp_path / 'epoch_7.pth').symlink_to(tmp_path / 'gone.pth')
    (tmp_path / 'epoch_6.pth').symlink_to(tmp_path / 'epoch_6.pth')
    os.mkfifo(tmp_path / 'last_checkpoint')
    assert Path(resume.find_checkpoint(tmp_path)[0]) == good
    for name in (9, 8, 7, 6):
        with pytest.raises(UsageError, match='is not a file|does not exist'):
            resume.load_resumable(tmp_path / f'epoch_{name}.pth')


def test_the_folder_of_checkpoints():
    from mmengine.config import Config

    hook = dict(checkpoint=dict(out_dir='/a/b'))
    assert resume.checkpoint_folder(Config(), 'x/run') == Path('x/run')
    cfg = Config(dict(default_hooks=hook))
    assert resume.checkpoint_folder(cfg, 'x/run') == Path('/a/b/run')


def test_nothing_there(tmp_path):
    assert resume.find_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    'more, missing',
    [
        (dict(meta={}), 'number `meta.epoch`'),
        (dict(meta=dict(epoch=1, iter=-1)), 'number `meta.iter`'),
        (dict(meta=None), 'dict `meta`'),
        (dict(state_dict=[]), 'dict `state_dict`'),
        (dict(state_dict=dict(w=1)), 'tensors alone'),
        (dict(optimizer=None), 'dict `optimizer`'),
        (dict(message_hub={}), 'dict `message_hub.log_scalars`'),
    ],
)
def test_what_cannot_be_resumed(tmp_path, more, missing):
    path = save(tmp_path / 'epoch_1.pth', **more)
    with pytest.raises(UsageError, match=missing):
        resume.load_resumable(path)


def test_the_seed_of_the_checkpoint_counts(tmp_path):
    from mmengine.config import Config

    cfg = Config(dict(work_dir=str(tmp_path), randomness=dict(seed=None)))
    path = str(save(tmp_path / 'epoch_1.pth'))
    resume.set_start(cfg, path)
    assert (cfg.resume, cfg.load_from) == (True, path)
    assert cfg.randomness == dict(seed=7)


def test_resume_from_the_config_is_the_same(tmp_path):
    from mmengine.config import Config

    save(tmp_path / 'epoch_1.pth')
    cfg = Config(dict(work_dir=str(tmp_path), resume=True))
    resume.set_start(cfg, None)
    assert cfg.load_from.endswith('epoch_1.pth')
    cfg = Config(dict(work_dir=str(tmp_path), resume=True, load_from='x.pth'))
    with pytest.raises(UsageError, match='x.pth does not exist'):
        resume.set_start(cfg, None)
