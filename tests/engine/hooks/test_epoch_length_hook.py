"""A run that goes on with another number of steps in an epoch."""

import math
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

import mmauxq.algorithms  # noqa: F401  (before anything is forked)
from mmauxq import compat
from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.engine import resumable_loops as loops
from mmauxq.engine.hooks import EpochLengthHook
from mmauxq.engine.hooks.epoch_length_hook import IMAGES, LENGTH
from tests.conftest import ROOT
from tests.networks import captured
from tests.running import make_runner
from tests.support import killing

pytestmark = pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')


# --- a checkpoint as it is loaded ------------------------------------------


def loaded(tmp_path, meta, info, schedules=(), states=None, **settings):
    """(checkpoint, messages) after the hook, in a run of 4 steps an epoch."""
    runner = make_runner(
        tmp_path, param_scheduler=list(schedules) or None, **settings
    )
    runner.train_loop  # noqa: B018  (builds it)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    if schedules:
        runner.param_schedulers = runner.build_param_scheduler(
            runner.param_schedulers
        )
    runner._resume = True
    checkpoint = dict(
        meta=meta, message_hub=dict(runtime_info=info), param_schedulers=[]
    )
    if states:
        checkpoint['param_schedulers'] = states
    with captured() as messages:
        EpochLengthHook().after_load_checkpoint(runner, checkpoint)
    return checkpoint, messages


@pytest.mark.parametrize(
    'epoch, before, length, images, after, again',
    [
        (1, 8, 8, 2, 4, 0),  # between epochs
        (1, 2, 2, 8, 4, 0),
        (1, 3, 2, 8, 6, 0),  # within one
        (1, 11, 8, 2, 5, 2),  # 3 steps of 2 images are 1 of 4, and 2 more
        (0, 8, 8, 2, 4, 0),  # all steps done, but the epoch not yet over
        (2, 3, 8, 2, 8, 0),  # no possible place: the epoch begins
        (1, 3, 2, None, 6, 0),
        (1, 5, 4, 4, 5, 0),  # nothing has changed
    ],
)
def test_iterations_count_in_steps_of_this_run(
    tmp_path, epoch, before, length, images, after, again
):
    meta, info = dict(epoch=epoch, iter=before), {LENGTH: length}
    if images:
        info[IMAGES] = images
    checkpoint, messages = loaded(tmp_path, meta, info)
    assert checkpoint['meta'] == dict(epoch=epoch, iter=after)
    expected = (
        f'an epoch has 4 steps, not {length} as before: iteration {before} '
        f'counts as {after}; learning rates stay'
    )
    if again:
        expected += f'; {again} images come twice in this epoch'
    assert messages == ([] if length == 4 else [expected])


def test_the_length_of_an_epoch_in_checkpoints_without_a_note(tmp_path):
    info = dict(max_iters=24, max_epochs=3)
    checkpoint, _ = loaded(tmp_path, dict(epoch=2, iter=16), info)
    assert checkpoint['meta']['iter'] == 8
    checkpoint, _ = loaded(tmp_path, dict(epoch=2, iter=16), {})
    assert checkpoint['meta']['iter'] == 16  # nobody knows


@pytest.mark.parametrize(
    'validated, expected', [(16, 8), (17, 8), (8, 7), (2, 2)]
)
def test_whether_a_validation_is_owed_stays(tmp_path, validated, expected):
    info = {LENGTH: 8, IMAGES: 2, loops.VALIDATED: validated}
    loaded(tmp_path, dict(epoch=2, iter=16), info)
    assert info[loops.VALIDATED] == expected


def test_without_resume_nothing_changes(tmp_path):
    runner = make_runner(tmp_path)
    info = {LENGTH: 8, IMAGES: 2, loops.VALIDATED: 16}
    checkpoint = dict(
        meta=dict(epoch=2, iter=16), message_hub=dict(runtime_info=dict(info))
    )
    with captured() as messages:
        EpochLengthHook().after_load_checkpoint(runner, checkpoint)
    assert checkpoint['meta'] == dict(epoch=2, iter=16)
    assert checkpoint['message_hub']['runtime_info'] == info
    assert messages == []


def test_iterations_of_a_loop_by_iteration_stay(tmp_path):
    train_cfg = dict(type='mmauxq.IterLoop', max_iters=12)
    info = {LENGTH: 8, IMAGES: 2}
    checkpoint, messages = loaded(
        tmp_path, dict(epoch=0, iter=6), info, train_cfg=train_cfg
    )
    assert checkpoint['meta']['iter'] == 6
    assert messages == [
        'a step has 4 images, not 2 as before: iteration 6 stays, and the '
        'data go on where so many steps of the new size lead; learning rates '
        'stay'
    ]


def test_schedules_in_epochs_move_and_those_in_steps_stay(tmp_path):
    kinds = [
        dict(type='LinearLR', by_epoch=False, end=50),
        dict(type='LinearLR', convert_to_iter_based=True, end=1),
        dict(
            type='CosineAnnealingLR', convert_to_iter_based=True, begin=1,
            T_max=2,
        ),
        dict(type='MultiStepLR', milestones=[1, 2]),
    ]  # fmt: skip
    # of a run of 8 steps an epoch, at its 16th
    states = [
        dict(begin=0, end=50, total_iters=49, last_step=16, _global_step=16),
        dict(begin=0, end=8, total_iters=7, last_step=7, _global_step=16),
        dict(begin=8, T_max=16, last_step=8, _global_step=16),
        dict(last_step=2, _global_step=2),
    ]
    defaults = dict(start_factor=1 / 3, end_factor=1.0)
    states[0] |= defaults | dict(
        param_name='lr', by_epoch=False, verbose=False
    )
    kept = [dict(state) for state in states]
    info = {LENGTH: 8, IMAGES: 2}
    checkpoint, _ = loaded(
        tmp_path, dict(epoch=2, iter=16), info, kinds, states,
        train_cfg=dict(type='mmauxq.EpochLoop', max_epochs=3),
    )  # fmt: skip
    found = checkpoint['param_schedulers']
    assert [found[i] for i in (0, 3)] == [kept[i] for i in (0, 3)]
    names = ('begin', 'end', 'last_step', '_global_step')
    assert [found[1][n] for n in names] == [0, 4, 3, 8]
    assert (found[1]['total_iters'], found[2]['T_max']) == (3, 8)
    assert [found[2][n] for n in names if n != 'end'] == [4, 4, 8]


# --- runs ------------------------------------------------------------------

# 64 images as they are, so that they can be told apart
CONFIG = f"""
_base_ = ['{ROOT}/configs/qat_r20_w2a2_digits.py']
experiment_name = '{{name}}'
randomness = dict(seed=5)
model = dict(architecture=dict(
    backbone=dict(depth=8, base_channels=4), head=dict(in_channels=16)))
train_dataloader = dict(
    batch_size=4,
    dataset=dict(indices=64, pipeline=[dict(type='PackInputs')]))
val_dataloader = dict(dataset=dict(indices=16))
train_cfg = dict(max_epochs=3)
param_scheduler = dict(T_max=3)
default_hooks = dict(logger=dict(interval=1))
"""
WITHIN = "default_hooks['checkpoint'] = dict(interval=3, by_epoch=False)\n"


@pytest.fixture
def config(tmp_path):
    compat.enable_safe_checkpoints()
    path = tmp_path / 'config.py'
    path.write_text(CONFIG.format(name=tmp_path.name))
    return path


def rates(work_dir: Path) -> list[float]:
    """Learning rate of each step, those before the kill at the beginning."""
    last = Path((work_dir / 'last_checkpoint').read_text())
    hub = read_checkpoint(last)['message_hub']
    return hub['log_scalars']['train/lr']['log'].tolist()


def cosine(top: float, begin: int, end: int) -> list[float]:
    parts = [step / end for step in range(begin, end)]
    return [top * (1 + math.cos(math.pi * part)) / 2 for part in parts]


def test_no_epoch_is_skipped_with_larger_batches(tmp_path, config):
    """Iteration 8 is the end of the first epoch, but also of a second one."""
    log, run = tmp_path / 'log', tmp_path / 'run'
    words = [config, '--work-dir', run, '--resume', '--cfg-options']
    size = 'train_dataloader.batch_size={}'.format
    point = killing.at_step(9)
    assert killing.run_train([*words, size(8)], log, point) == -9
    assert killing.run_train([*words, size(16)], log) == 0
    assert 'resumed epoch: 1, iter: 4\n' in log.read_text()
    found = rates(run)
    assert len(found) == 8 + 2 * 4
    assert found[8:] == pytest.approx(cosine(found[0], 4, 12), rel=1e-6)
    hub = read_checkpoint(run / 'epoch_3.pth')['message_hub']
    # that of the first epoch was owed, that of the third is yet to come
    assert len(hub['log_scalars']['val/accuracy/top1']['log']) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason='for gloo')
def test_fewer_ranks_see_the_rest_of_the_epoch(tmp_path, config):
    """From four ranks to two: steps, schedule, and each image once."""
    with config.open('a') as file:
        file.write(WITHIN)
    log, run = tmp_path / 'log', tmp_path / 'run'
    words = [config, '--work-dir', run, '--resume']

    def note(until: int | None):
        def prepare() -> None:
            run_iter = loops.EpochLoop.run_iter

            def noted(self, index, batch):
                if self._iter == until:
                    killing.die()
                name = f'seen{os.environ["RANK"]}'
                with (tmp_path / name).open('a') as file:
                    for image in batch['inputs']:
                        file.write(f'{self._epoch} {image.tolist()}\n')
                run_iter(self, index, batch)

            loops.EpochLoop.run_iter = noted

        return prepare

    # the others may see a closed connection before they die
    assert set(killing.run_ranks(4, words, log, note(6))) <= {-9, 1}
    done = killing.run_ranks(2, words, log, note(None))
    assert done == [0, 0], log.read_text()[-3000:]
    # 2 of 4 steps of the second epoch were done: 4 of 8
    assert 'iteration 6 counts as 12; learning rates stay\n' in log.read_text()
    assert 'resumed epoch: 1, iter: 12\n' in log.read_text()
    seen = [Counter(), Counter(), Counter()]
    for path in tmp_path.glob('seen?'):
        for line in path.read_text().splitlines():
            epoch, image = line.split(' ', 1)
            seen[int(epoch)][image] += 1
    assert seen[0].total() == 64
    assert seen[0] == seen[1] == seen[2]
    found = rates(run)
    assert len(found) == 6 + 12
    assert found[6:] == pytest.approx(cosine(found[0], 12, 24), rel=1e-6)
