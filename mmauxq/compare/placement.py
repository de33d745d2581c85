"""The runs of a comparison, and the GPU that each of them is on."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmauxq.errors import UsageError

CONTEXT = 2**29
"""Bytes that a process takes on a GPU beside its tensors, generously."""


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Args:
        arm: Its name.
        seed: Of everything random.
        folder: Of its files.
        label: What else its arm is trained with, for people.
    """

    arm: str
    seed: int
    folder: Path
    label: str = ''

    @property
    def name(self) -> str:
        """What people see of it."""
        parts = self.arm, self.label, str(self.seed)
        return ' '.join(part for part in parts if part)

    @property
    def result(self) -> Path:
        return self.folder / 'result.json'

    @property
    def shared(self) -> Path:
        """Exists where another run was on the same device meanwhile."""
        return self.folder / 'shared'

    @property
    def diverged(self) -> Path:
        """Exists where the run ended in NaN or infinity."""
        return self.folder / 'diverged'

    @property
    def progress(self) -> tuple[int, int]:
        """Steps done, and their number (0 before the first step)."""
        return self._numbers('progress') or (0, 0)

    @property
    def memory(self) -> tuple[int, int] | None:
        """Bytes free on the GPU of the run, and bytes that it holds there.

        None before its first steps, and on the CPU.
        """
        return self._numbers('memory')

    def _numbers(self, name: str) -> tuple[int, int] | None:
        try:
            text = (self.folder / name).read_text()
            first, second = map(int, text.split())
        except (OSError, ValueError):  # absent, or being written
            return None
        return first, second


def find_gpus(most: int | None = None) -> list[str]:
    """The GPUs for a comparison, each as a value of CUDA_VISIBLE_DEVICES.

    Of a CUDA_VISIBLE_DEVICES that is set, with numbers or UUIDs, the values
    are the parts; CUDA counts those before the first that it does not know.

    Args:
        most: How many to use; None for all that are visible.

    Raises:
        UsageError: If there are fewer.
    """
    count = torch.cuda.device_count()  # makes no CUDA context
    if most is not None and most > count:
        raise UsageError(
            f'--gpus: expected at most {count}, as many as are visible, '
            f'got {most}'
        )
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    numbers = ','.join(map(str, range(count)))
    words = (numbers if visible is None else visible).split(',')
    return [word.strip() for word in words][:count][:most]


class Placement:
    """Spreads runs over GPUs, those with the fewest runs first.

    Args:
        runs: All runs of the comparison, also finished ones; what they took
            says what the others need.
        gpus: Values of CUDA_VISIBLE_DEVICES; none for the CPU.
        jobs: Most runs at a time on each.
    """

    def __init__(
        self, runs: Sequence[Run], gpus: Sequence[str], jobs: int
    ) -> None:
        self.runs = runs
        self.gpus = gpus
        self.jobs = jobs
        self.devices: list[list[Run]] = [[] for _ in gpus or ('CPU',)]
        self.alone: set[Run] = set()
        """Runs that share no device."""

    def add(self, run: Run) -> str | None:
        """Give a run its place, if there is one.

        Returns:
            Its value of CUDA_VISIBLE_DEVICES, or None: it has to wait.
        """
        for mates in sorted(self.devices, key=len):
            if not self._fits(run, mates):
                continue
            for name in ('memory', 'shared'):  # of an earlier process
                (run.folder / name).unlink(missing_ok=True)
            mates.append(run)
            for one in mates if len(mates) > 1 else ():
                one.shared.touch()
            return self.gpus[self._device(run)] if self.gpus else ''
        return None

    def remove(self, run: Run) -> None:
        """Free the place of a run."""
        self.devices[self._device(run)].remove(run)

    def where(self, run: Run) -> str:
        """``gpu 1`` for a run on the second of the GPUs; empty on the CPU."""
        return f'gpu {self._device(run)}' if self.gpus else ''

    def _device(self, run: Run) -> int:
        return next(i for i, d in enumerate(self.devices) if run in d)

    def _fits(self, run: Run, mates: Sequence[Run]) -> bool:
        if not mates:
            return True
        if len(mates) >= self.jobs or self.alone & {run, *mates}:
            return False
        if not self.gpus:
            return True
        memory = {one: one.memory for one in self.runs}
        held = {one: found[1] for one, found in memory.items() if found}
        reports = [report for one in mates if (report := memory[one])]
        if not reports:  # what they take, and what is left, is not known yet
            return False

        def needed(one: Run) -> int:
            same = [held[other] for other in held if other.arm == one.arm]
            return CONTEXT + max(same or held.values())

        free = min(free for free, _ in reports)
        coming = [one for one in mates if one not in held]
        return free >= sum(map(needed, [run, *coming]))
