from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import Hook

from mmauxq.registry import HOOKS

from ..resumable_loops import VALIDATED, EpochLoop, IterLoop

LENGTH, IMAGES = 'mmauxq/epoch_length', 'mmauxq/step_images'
COUNTED = {'last_step', '_global_step', '_last_value', 'base_values'}
"""State that a schedule counts; the rest of it comes from the config."""


@HOOKS.register_module()
class EpochLengthHook(Hook):
    """Lets a run go on with another number of ranks, or another batch size.

    MMEngine takes the iteration and the schedules of the checkpoint as they
    are, although with half the ranks an epoch has twice the steps. Here
    iterations count as if all epochs before had had the new number of steps;
    schedules that the config gives in epochs keep their place in the
    training, those given in steps go on with their steps. Within an epoch,
    the images that follow are those not seen yet, as far as whole steps
    allow. A log line says what happens; learning rates are not scaled.

    ``mmauxq train`` and ``mmauxq compare`` register the hook. It works on the
    checkpoint while it is loaded, for the loops of this package.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Any) -> None:
        """Store in checkpoints how long an epoch and a step are."""
        loader = runner.train_loop.dataloader
        runner.message_hub.update_info(LENGTH, len(loader))
        runner.message_hub.update_info(IMAGES, step_images(loader))

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if not runner._resume:
            return
        loop, meta = runner.train_loop, checkpoint['meta']
        info = checkpoint['message_hub']['runtime_info']
        old, new = _length(info), len(loop.dataloader)
        images, now = info.get(IMAGES), step_images(loop.dataloader)
        if isinstance(loop, IterLoop) and images and now and images != now:
            runner.logger.warning(
                f'a step has {now} images, not {images} as before: iteration '
                f'{meta["iter"]} stays, and the data go on where so many '
                'steps of the new size lead; learning rates stay'
            )
        if not isinstance(loop, EpochLoop) or not old or old == new:
            return
        before, again = meta['iter'], 0
        done = before - meta['epoch'] * old
        if done == old:
            done = new
        elif not 0 < done < old:
            done = 0
        elif images and now:
            done, again = divmod(done * images, now)
        else:
            done = done * new // old
        meta['iter'] = after = meta['epoch'] * new + min(done, new)
        validated = info.get(VALIDATED)
        if validated is not None:
            owed = validated < before
            info[VALIDATED] = min(validated, after - 1) if owed else after
        states = checkpoint.get('param_schedulers') or []
        for schedule, state in zip(
            runner.param_schedulers or [], states, strict=False
        ):
            _move(schedule, state, after - before)
        runner.logger.warning(
            f'an epoch has {new} steps, not {old} as before: iteration '
            f'{before} counts as {after}; learning rates stay'
            + (f'; {again} images come twice in this epoch' if again else '')
        )


def step_images(loader: Any) -> int | None:
    """Images in a step of all ranks; None if the loader does not say."""
    size = getattr(loader.batch_sampler, 'batch_size', None)
    return size and size * get_world_size()


def _length(info: dict) -> int | None:
    """Steps in an epoch of the run that is resumed."""
    if info.get(LENGTH):
        return info[LENGTH]
    steps, epochs = info.get('max_iters'), info.get('max_epochs')
    return steps // epochs if steps and epochs else None


def _move(schedule: Any, state: dict, by: int) -> None:
    """Count the state of a resumed schedule in the steps of this run.

    Args:
        schedule: As the config gives it in this run.
        state: Changed.
        by: Steps between the iterations of the two runs.
    """
    fresh = schedule.state_dict()
    given = {k: v for k, v in fresh.items() if k not in COUNTED}
    in_steps = all(state.get(name) == v for name, v in given.items())
    if schedule.by_epoch or in_steps:
        return
    state.update(given)
    state['_global_step'] += by
    span = schedule.end - schedule.begin
    since = state['_global_step'] - schedule.begin + 1
    state['last_step'] = min(max(since, 0), span) - 1
