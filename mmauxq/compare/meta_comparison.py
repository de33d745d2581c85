"""Several comparisons side by side: in which settings an arm helps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmauxq import text
from mmauxq.errors import UsageError

from .comparison import by_arm, by_seed, collect, steps_count
from .records import metric
from .statistics import PairedDifference, paired_difference, spread


@dataclass(frozen=True)
class Effect:
    """An arm beside the reference of its comparison.

    Args:
        setting: Name of the comparison's folder.
        arm: Name of the arm.
        result: Its final metric, percent, one for each shared seed.
        reference: That of the reference.
        step: Its median step time over that of the reference; None where the
            times of the comparison cannot be compared.
        metric: What is compared, for people.
    """

    setting: str
    arm: str
    result: tuple[float, ...]
    reference: tuple[float, ...]
    step: float | None
    metric: str = 'top-1'

    @property
    def difference(self) -> PairedDifference:
        """Result minus reference, in percentage points."""
        return paired_difference(self.result, self.reference)


def effects(
    folders: Sequence[Path], reference: str | None = None
) -> list[Effect]:
    """Every arm of every folder against one arm, by default the first there.

    Raises:
        UsageError: If a folder holds no finished run, lacks the reference, or
            there is nothing to compare it with; or the folders differ in what
            they compare.
    """
    result = []
    for folder in folders:
        records = collect(folder)
        arms = by_arm(records)
        base = reference or next(iter(arms))
        if base not in arms:
            raise UsageError(
                f'{folder}: expected an arm {base!r}, got {", ".join(arms)}'
            )
        for name, runs in arms.items():
            shared = sorted(set(runs) & set(arms[base]))
            if name == base or not shared:
                continue
            finals = by_seed('final', shared, runs, arms[base])
            seconds = by_seed('step_seconds', shared, runs, arms[base])
            of, base_of = np.median(seconds, axis=1)
            step = of / base_of if steps_count(records) else None
            setting = folder.resolve().name
            what = metric(records)
            result.append(Effect(setting, name, *finals, step, what))
    metrics = sorted({effect.metric for effect in result})
    if len(metrics) > 1:
        raise UsageError(
            'expected comparisons by one metric, got some by '
            f'{" and some by ".join(metrics)}'
        )
    if not result:
        raise UsageError(
            'no folder holds two arms that share a seed; nothing to compare'
        )
    return result


def together(effects: Sequence[Effect]) -> list[Effect]:
    """Arms that are in several settings, all their pairs as one sample.

    Settings with more seeds count more.
    """
    arms: dict[str, list[Effect]] = {}
    for effect in effects:
        arms.setdefault(effect.arm, []).append(effect)
    return [
        Effect(
            'together',
            f'{name}, {len(settings)} settings',
            sum((effect.result for effect in settings), ()),
            sum((effect.reference for effect in settings), ()),
            _median([effect.step for effect in settings]),
            settings[0].metric,
        )
        for name, settings in arms.items()
        if len(settings) > 1
    ]


def _median(steps: Sequence[float | None]) -> float | None:
    known = [step for step in steps if step is not None]
    return float(np.median(known)) if known else None


def table(effects: Sequence[Effect]) -> str:
    """A row of Markdown for each effect."""
    head = ['setting', f'reference, {effects[0].metric}', 'arm',
            'difference, 95% interval, wins', 'step']  # fmt: skip
    rows: list[list] = []
    for i, effect in enumerate(effects):
        setting = [effect.setting, spread(effect.reference)]
        if i and effects[i - 1].setting == effect.setting:
            setting = ['', '']
        step = '' if effect.step is None else f'{effect.step:.2f}'
        rows.append([*setting, effect.arm, effect.difference, step])
    return text.table(head, rows)
