"""Several comparisons side by side: in which setting an arm helps."""

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
        reference: Final top-1 of the arm that it is compared with, percent,
            one for each shared seed.
        difference: Of the arm to that one, in points.
        step: Its median step time over that of the other.
    """

    setting: str
    arm: str
    reference: tuple[float, ...]
    difference: PairedDifference
    step: float


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
                    tuple(theirs),
                    paired_difference(ours, theirs),
                    float(steps[0] / steps[1]),
                )
            )
    if not found:
        raise UsageError(
            'no folder holds two arms that share a seed; nothing to compare'
        )
    return found


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
