"""Several comparisons side by side: in which setting an arm helps."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmauxq.errors import UsageError

from .comparison import by_arm, collect, finals
from .statistics import PairedDifference, paired_difference, spread


@dataclass(frozen=True)
class Effect:
    """What an arm does in one setting.

    Args:
        setting: Name of the comparison's folder.
        arm: Name of the arm.
        result: Its final top-1, percent, one for each shared seed.
        reference: That of the arm that it is compared with.
        step: Its median step time over that of the other.
    """

    setting: str
    arm: str
    result: tuple[float, ...]
    reference: tuple[float, ...]
    step: float

    @property
    def difference(self) -> PairedDifference:
        """Of the arm to the other one, in points."""
        return paired_difference(self.result, self.reference)


def effects(
    folders: Sequence[Path], reference: str | None = None
) -> list[Effect]:
    """Every arm of every comparison against the reference of its folder.

    Args:
        folders: Of comparisons, or with their ``results.jsonl`` alone.
        reference: Name of an arm; by default the first of each folder.

    Raises:
        UsageError: If a folder holds no finished run, lacks the reference, or
            there is nothing to compare it with.
    """
    found = []
    for folder in folders:
        arms = by_arm(collect(folder))
        base = reference or next(iter(arms))
        if base not in arms:
            raise UsageError(
                f'{folder}: there is no arm {base!r}; there are '
                f'{", ".join(arms)}'
            )
        for name, runs in arms.items():
            shared = sorted(set(runs) & set(arms[base]))
            if name == base or not shared:
                continue
            ours, theirs = finals(shared, runs, arms[base])
            steps = [
                np.median([of[seed]['step_seconds'] for seed in shared])
                for of in (runs, arms[base])
            ]
            found.append(
                Effect(
                    folder.resolve().name,
                    name,
                    tuple(ours),
                    tuple(theirs),
                    float(steps[0] / steps[1]),
                )
            )
    if not found:
        raise UsageError(
            'no folder holds two arms that share a seed; nothing to compare'
        )
    return found


def together(found: Sequence[Effect]) -> list[Effect]:
    """Arms that are in several settings, all their pairs as one sample.

    The interval is that of the mean over these pairs, whatever their setting:
    settings with more seeds count more.
    """
    arms: dict[str, list[Effect]] = {}
    for effect in found:
        arms.setdefault(effect.arm, []).append(effect)
    return [
        Effect(
            'together',
            f'{name}, {len(mine)} settings',
            tuple(itertools.chain(*(effect.result for effect in mine))),
            tuple(itertools.chain(*(effect.reference for effect in mine))),
            float(np.median([effect.step for effect in mine])),
        )
        for name, mine in arms.items()
        if len(mine) > 1
    ]


def table(found: Sequence[Effect]) -> str:
    """As Markdown, a row for each effect."""
    rows = [
        '| setting | reference, top-1 | arm | difference, 95% interval, wins '
        '| step |',
        '|---|---|---|---|---|',
    ]
    before = ''
    for effect in found:
        named = effect.setting != before
        before = effect.setting
        mean = spread(effect.reference)
        rows.append(
            f'| {effect.setting if named else ""} | {mean if named else ""} | '
            f'{effect.arm} | {effect.difference} | {effect.step:.2f} |'
        )
    return '\n'.join(rows) + '\n'
