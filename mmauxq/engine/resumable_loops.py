"""Training loops that a resumed run enters exactly where it was left."""

import bisect
import copy
import itertools
from collections.abc import Iterator
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.dist import all_gather_object
from mmengine.runner import EpochBasedTrainLoop
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Sampler

from mmauxq.errors import UsageError
from mmauxq.forward_hooks import forward_hooks
from mmauxq.registry import LOOPS

from .prefetch import END, Batches, device_of, label_preprocessor
from .running import bare_model, seed_step

VALIDATED = 'mmauxq/validated'
LEAST_HISTORY = 2000


class ResumableLoop(EpochBasedTrainLoop):
    """What the two loops share."""

    by_epoch = True

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """One step; a UsageError if a batch norm gets one value a channel."""
        self._bound_histories()
        try:
            super().run_iter(idx, data_batch)
        except Exception as error:
            # torch's words; under torch.compile it has another type
            words = 'Expected more than 1 value per channel when training'
            _, found, size = str(error).partition(words)
            if not found:
                raise
            raise UsageError(
                f'train_dataloader: step {self._iter}: expected 2 or more '
                f'values per channel{size.splitlines()[0]}; '
                'set drop_last=True or another batch_size'
            ) from error

    def _bound_histories(self) -> None:
        """Let the log keep an epoch of each number, and not a million, with
        which memory and checkpoints would grow."""
        if self._iter % 1000:
            return
        longest = max(len(self.dataloader), LEAST_HISTORY)
        for name, buffer in self.runner.message_hub.log_scalars.items():
            if name.startswith('train/'):
                buffer.max_length = min(buffer.max_length, longest)

    def _begin(self, between_epochs: bool = True) -> None:
        """Call the hooks; validate if the run was killed before it could.

        Raises:
            UsageError: If ranks have different numbers of batches, so that
                one would wait for another for ever; or if a pass over the
                data has no batch, or no end.
        """
        check_length(
            self.dataloader, 'train_dataloader', endless=not self.by_epoch
        )
        if self.runner.val_loop is not None:
            check_length(self.runner.val_loop.dataloader, 'val_dataloader')
        lengths = all_gather_object(len(self.dataloader))
        if len(set(lengths)) > 1:
            raise UsageError(
                'train_dataloader: expected as many batches in an epoch on '
                f'each rank, got {" and ".join(map(str, lengths))}; set '
                'sampler.round_up=True or drop_last=True'
            )
        hub = self.runner.message_hub
        info = hub.runtime_info
        place = {key: info[key] for key in ('epoch', 'iter') if key in info}
        self.runner.call_hook('before_train')
        if VALIDATED not in info:  # a new run, or one of another loop
            hub.update_info(VALIDATED, self._iter)
        elif info[VALIDATED] < self._iter and between_epochs:
            # the best checkpoint stores it, and hooks have moved on
            hub.update_info_dict(place)
            self._validate_if_due()

    def _batches_from(self, start: int) -> Iterator[Any]:
        """The batches of a pass without the first ``start``, in their steps.

        Where other processes make them, the next one is fetched as soon as a
        forward pass is launched, and its labels are prepared. Made in this
        process it would draw random numbers before its turn, and a resumed
        run would not be the same.
        """
        self._seed('epoch')
        model = self.runner.model
        device = device_of(model) if self.dataloader.num_workers > 0 else None
        batches = Batches(
            starting_at(self.dataloader, start),
            device,
            label_preprocessor(bare_model(self.runner)),
        )

        def fetch(name: str, module: nn.Module, x: Any, output: Any) -> None:
            if module.training:
                batches.fetch()

        ahead = [('', model)] if device else []
        with forward_hooks(ahead, fetch), batches.preprocessing():
            self._seed()
            while (batch := batches.take()) is not END:
                yield batch
                self._seed()

    def _seed(self, what: str = 'train') -> None:
        seed_step(self.runner.seed, self._iter, what)

    def _validate_if_due(self) -> None:
        done, whole = self._epoch, self._max_epochs
        if not self.by_epoch:
            done, whole = self._iter, self._max_iters
        phase = bisect.bisect(self.dynamic_milestones, done + 1) - 1
        self.val_interval = self.dynamic_intervals[phase]
        if (
            self.runner.val_loop is not None
            and done >= self.val_begin
            and (done % self.val_interval == 0 or done == whole)
        ):
            self._validate()

    def _validate(self) -> None:
        """Validate, and note for which step it was done.

        The note is stored with the best checkpoint, which is saved after
        validation, but not with that of the epoch, saved before.
        """
        self._seed('val')
        self.runner.message_hub.update_info(VALIDATED, self._iter)
        self.runner.val_loop.run()


@LOOPS.register_module()
class EpochLoop(ResumableLoop):
    """MMEngine's loop over epochs, with an exact resume.

    A run that was killed and resumed goes on with the batch, the random
    numbers and the validation that come next, where MMEngine begins the epoch
    anew, skips the validation, and draws other random numbers.

    Random numbers of loader processes are exact if the processes start anew
    each epoch (``persistent_workers=False``) and the checkpoint is one of the
    end of an epoch. The order of samples always is.

    Args: as of MMEngine's ``EpochBasedTrainLoop``.
    """

    def run(self) -> Any:
        self._begin(self._done_in_epoch() == 0)
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._validate_if_due()
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_epoch(self) -> None:
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        start = self._done_in_epoch()
        for index, batch in enumerate(self._batches_from(start), start):
            if index == len(self.dataloader):
                raise UsageError(
                    'train_dataloader: expected an epoch to end after the '
                    f'{index} batches of its length, got another; see its '
                    'sampler or batch_sampler'
                )
            self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _done_in_epoch(self) -> int:
        length = len(self.dataloader)
        done = self._iter - self._epoch * length
        # another length of epoch than that of the checkpoint: begin anew
        return done if 0 <= done <= length else 0


@LOOPS.register_module()
class IterLoop(ResumableLoop):
    """A loop over iterations, as MMEngine's, with an exact resume.

    See :class:`EpochLoop`. Batches before the first are not loaded again, and
    nothing waits where a pass over the data ends.

    Args: as of MMEngine's ``IterBasedTrainLoop``.
    """

    by_epoch = False

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        max_iters: int,
        val_begin: int = 1,
        val_interval: int = 1000,
        dynamic_intervals: list[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(
            runner, dataloader, 1, val_begin, val_interval, dynamic_intervals
        )
        self._max_iters = int(max_iters)

    def run(self) -> Any:
        self._begin()
        self.runner.call_hook('before_train_epoch')
        batches = self._batches()
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(self._iter, next(batches))
            self._validate_if_due()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def _batches(self) -> Iterator[Any]:
        """The batches from the next one on, for ever."""
        passes, start = divmod(self._iter, len(self.dataloader))
        sampler = self.dataloader.sampler
        if isinstance(sampler, InfiniteSampler):
            passes, start = 0, self._iter
        for number in itertools.count(passes):
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(number)
            yield from self._batches_from(start)
            start = 0


def check_length(loader: Any, place: str, endless: bool = False) -> None:
    """Check that a pass over the data has a first batch and a last one.

    Args:
        loader: Of a loop.
        place: Its section in the config.
        endless: Whether it may go on for ever.

    Raises:
        UsageError: If it has no batch, or its sampler never ends.
    """
    cutter = getattr(loader, 'batch_sampler', None)
    sampler = getattr(cutter, 'sampler', None)
    if not endless and isinstance(sampler, InfiniteSampler):
        raise UsageError(
            f'{place}.sampler: expected one that ends, such as '
            'DefaultSampler, got InfiniteSampler; in training, '
            "train_cfg.type='IterBasedTrainLoop' takes it"
        )
    if cutter is not None and len(cutter) == 0 < len(loader.dataset):
        raise UsageError(
            f'{place}: expected at least one batch, got none; a smaller '
            'batch_size or drop_last=False'
        )


def starting_at(loader: DataLoader, start: int) -> Iterator[Any]:
    """The batches of a loader without the first ``start``, which are not
    loaded where batches are plain cuts of the sampler."""
    cutter = loader.batch_sampler
    if not start or type(cutter) is not BatchSampler:
        batches = iter(loader)
        for _ in range(start):
            next(batches, None)
        return batches
    rest = copy.copy(loader)
    rest._iterator = None  # persistent processes serve one pass at a time
    # not by an assignment: a loader forbids it
    vars(rest)['batch_sampler'] = BatchSampler(
        _Rest(cutter.sampler, start * cutter.batch_size),
        cutter.batch_size,
        cutter.drop_last,
    )
    return iter(rest)


class _Rest(Sampler):
    """What a sampler gives, without the first ``start`` indices."""

    def __init__(self, sampler: Sampler, start: int) -> None:
        self.sampler, self.start = sampler, start

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self.sampler, self.start, None)
