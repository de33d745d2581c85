"""Processor time of an epoch of ``tools/train.py``, beside a plain loop's."""

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor

from mmauxq.cli import run

from .processes import Turn
from .recipes import ROOT

WARMUP = 2
"""Epochs that do not count: the first ones calibrate and allocate."""

RECIPE = """\
_base_ = {base!r}
model = dict(float_checkpoint=None)
train_cfg = dict(max_epochs={epochs})
custom_hooks = [dict(type='BesidePlainLoop')]
"""


def measure(network: str, repeats: int, work_dir: Path, turn: Turn) -> dict:
    """Train on digits with the command, and in turn with a plain loop.

    After each epoch of the command, with its validation and its checkpoint, a
    plain PyTorch loop trains, validates and saves a copy of the quantized
    network, with the same loader. Both run in this process on the CPU.

    Args:
        network: Of the recipe ``qat_NETWORK_w2a2_digits``, such as ``'r20'``.
        repeats: Epochs of each that count.
        work_dir: Folder of config, logs and checkpoints.
        turn: Taken for the whole run.

    Raises:
        RuntimeError: If the training fails.
    """
    base = ROOT / 'configs' / f'qat_{network}_w2a2_digits.py'
    work_dir.mkdir(parents=True, exist_ok=True)
    config = work_dir / 'config.py'
    epochs = repeats + WARMUP
    config.write_text(RECIPE.format(base=str(base), epochs=epochs))
    turn.take()
    status = run('train', [str(config), '--work-dir', str(work_dir)])
    turn.give()
    if status:
        raise RuntimeError(f'tools/train.py {config}: {status}')
    return _summary(BesidePlainLoop.records[WARMUP:])


def _summary(records: Sequence[dict]) -> dict:
    """Medians; of what is compared also the 10th and 90th percentile.

    Args:
        records: Of :class:`BesidePlainLoop`, one for each epoch.
    """
    row: dict[str, Any] = dict(repeats=len(records))
    for key in records[0]:
        values = sorted(record[key] for record in records)
        row[key] = round(statistics.median(values), 5)
        if key in ('ratio', 'added_us'):
            last = len(values) - 1
            row[f'{key}_low'] = round(values[round(0.1 * last)], 5)
            row[f'{key}_high'] = round(values[round(0.9 * last)], 5)
    return row


class Clock:
    """Adds up the processor time of this process, in seconds."""

    def __init__(self) -> None:
        self.total = self.start = 0.0

    def __enter__(self) -> None:
        self.start = time.process_time()

    def __exit__(self, *exc: object) -> None:
        self.total += time.process_time() - self.start


class ClockedLoader:
    """A data loader whose work is timed."""

    def __init__(self, loader: Any, clock: Clock) -> None:
        self.loader, self.clock = loader, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        with self.clock:
            batches = iter(self.loader)
        while True:
            with self.clock:
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


@HOOKS.register_module()
class BesidePlainLoop(Hook):
    """Times the epochs of a runner, and those of a plain loop after each.

    Attributes:
        records: For each epoch the seconds of the runner (``runner_s``), of
            the plain loop (``plain_s``) and of the loader in that
            (``loader_s``); the first as a part of the second (``ratio``); and
            the microseconds of an iteration of the runner that neither the
            loader nor ``train_step`` takes (``added_us``).
    """

    priority = 'HIGHEST'
    records: list[dict] = []

    def before_train(self, runner: Any) -> None:
        self.records.clear()
        self._epoch, self._steps = Clock(), Clock()
        self._train, self._data = Clock(), Clock()
        loop, model = runner.train_loop, runner.model
        self._plain = PlainLoop(runner)
        loop.dataloader = ClockedLoader(loop.dataloader, self._data)
        step = model.train_step

        def train_step(*args: Any, **kwargs: Any) -> Any:
            with self._train:
                return step(*args, **kwargs)

        model.train_step = train_step

    def before_train_epoch(self, runner: Any) -> None:
        if runner.epoch:
            self._finish(len(runner.train_loop.dataloader))
        for clock in (self._steps, self._train, self._data, self._epoch):
            clock.total = 0.0
        self._epoch.__enter__()
        self._steps.__enter__()

    def after_train_epoch(self, runner: Any) -> None:
        self._steps.__exit__()

    def after_train(self, runner: Any) -> None:
        self._finish(len(runner.train_loop.dataloader))

    def _finish(self, steps: int) -> None:
        self._epoch.__exit__()
        seconds, plain, loader = self._epoch.total, Clock(), Clock()
        with plain:
            self._plain.epoch(loader)
        added = self._steps.total - self._train.total - self._data.total
        self.records.append(
            dict(
                runner_s=seconds,
                plain_s=plain.total,
                loader_s=loader.total,
                ratio=seconds / plain.total,
                added_us=added / steps * 1e6,
            )
        )


class PlainLoop:
    """What a script in plain PyTorch does with a quantized network.

    Args:
        runner: Its model is copied; its data loaders and the settings of its
            optimizer are used.
    """

    def __init__(self, runner: Any) -> None:
        model = copy.deepcopy(runner.model)
        preprocessor = model.data_preprocessor
        self.mean, self.std = preprocessor.mean, preprocessor.std
        self.network = model.architecture
        self.loader = runner.train_loop.dataloader
        self.val_loader = runner.val_loop.dataloader
        model.calibrate(self._tensors(next(iter(self.loader)))[0])
        settings = runner.optim_wrapper.optimizer.defaults
        names = ('lr', 'momentum', 'nesterov', 'weight_decay')
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), **{n: settings[n] for n in names}
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, runner.max_iters
        )
        self.file = Path(runner.work_dir) / 'plain.pth'

    def _tensors(self, batch: dict) -> tuple[Tensor, Tensor]:
        images = batch['inputs']
        if not isinstance(images, Tensor):
            images = torch.stack(images)
        labels = torch.cat([s.gt_label for s in batch['data_samples']])
        return (images.float() - self.mean) / self.std, labels

    def epoch(self, clock: Clock) -> float:
        """Train, validate and save; returns the accuracy, 0 to 1.

        Args:
            clock: Runs while the loader works.
        """
        network, right, count = self.network, 0, 0
        network.train()
        for batch in ClockedLoader(self.loader, clock):
            images, labels = self._tensors(batch)
            logits = network.head(network.extract_feat(images))
            loss = torch.nn.functional.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            loss.item()  # as if it were logged
        network.eval()
        with torch.no_grad():
            for batch in ClockedLoader(self.val_loader, clock):
                images, labels = self._tensors(batch)
                logits = network.head(network.extract_feat(images))
                right += int((logits.argmax(1) == labels).sum())
                count += len(labels)
        state = dict(
            network=network.state_dict(), optimizer=self.optimizer.state_dict()
        )
        torch.save(state, self.file)
        return right / count
