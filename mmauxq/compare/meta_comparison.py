"""Several comparisons side by side: in which settings an arm helps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmauxq import text
from mmauxq.errors import UsageError

from .comparison import by_arm, by_seed, collect, steps_count
from .records import metric
from .statistics import (
    PairedDifference,
    clustered_interval,
    paired_difference,
    spread,
    with_interval,
)


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
        start: That of the float network which the reference started from;
            empty where it is not known.
    """

    setting: str
    arm: str
    result: tuple[float, ...]
    reference: tuple[float, ...]
    step: float | None
    metric: str = 'top-1'
    start: tuple[float, ...] = ()

    @property
    def loss(self) -> PairedDifference | None:
        """Float network minus reference, in percentage points, if known."""
        if not self.start:
            return None
        return paired_difference(self.start, self.reference)

    @property
    def difference(self) -> PairedDifference:
        """Result minus reference, in percentage points."""
        return paired_difference(self.result, self.reference)


@dataclass(frozen=True)
class Overall:
    """An arm beside the references of several settings.

    Args:
        name: Of the arm.
        effects: One for each setting.
    """

    name: str
    effects: tuple[Effect, ...]
    setting = 'together'

    @property
    def arm(self) -> str:
        return f'{self.name}, {len(self.effects)} settings'

    @property
    def metric(self) -> str:
        return self.effects[0].metric

    @property
    def reference(self) -> tuple[float, ...]:
        """The mean of the reference in each setting."""
        return tuple(float(np.mean(e.reference)) for e in self.effects)

    @property
    def difference(self) -> PairedDifference:
        """Of the means of each setting, which is the unit."""
        means = [np.mean(effect.result) for effect in self.effects]
        return paired_difference(means, self.reference)

    @property
    def pairs(self) -> list[np.ndarray]:
        """Result minus reference of each run, by setting."""
        return [np.subtract(e.result, e.reference) for e in self.effects]

    @property
    def step(self) -> float | None:
        """Median over the settings in which it is known."""
        steps = [e.step for e in self.effects if e.step is not None]
        return float(np.median(steps)) if steps else None


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
            starts = [arms[base][seed].get('float_final') for seed in shared]
            start = () if None in starts else tuple(starts)
            found = Effect(setting, name, *finals, step, what, start)
            result.append(found)
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


def together(effects: Sequence[Effect]) -> list[Overall]:
    """The arms that are in several settings."""
    arms: dict[str, list[Effect]] = {}
    for effect in effects:
        arms.setdefault(effect.arm, []).append(effect)
    return [
        Overall(name, tuple(settings))
        for name, settings in arms.items()
        if len(settings) > 1
    ]


def without_start(effects: Sequence[Effect]) -> str:
    """A line that names the settings of which no loss is known, if any."""
    names = list(dict.fromkeys(e.setting for e in effects if not e.start))
    if not names:
        return ''
    return (
        'Not in gain.png, because what their float networks reach is not in '
        f'the records: {", ".join(names)}.\n'
    )


def table(effects: Sequence[Effect], overall: Sequence[Overall] = ()) -> str:
    """A row of Markdown for each effect, and their number; then, in a table
    of its own, a row for each arm over its settings."""
    head = ['setting', f'reference, {effects[0].metric}', 'arm',
            'difference, 95% interval, wins', 'step']  # fmt: skip
    rows: list[list] = []
    for i, effect in enumerate(effects):
        setting = [effect.setting, spread(effect.reference)]
        if i and effects[i - 1].setting == effect.setting:
            setting = ['', '']
        rows.append([*setting, effect.arm, effect.difference, _step(effect)])
    count = len(effects) + len(overall)
    parts = [
        text.table(head, rows),
        f'Comparisons: {count}. '
        'One interval in twenty excludes 0 by chance.\n',
    ]
    if overall:
        parts.insert(1, _overall_table(overall))
    return '\n'.join(parts)


def _overall_table(overall: Sequence[Overall]) -> str:
    head = [
        *('arm', 'settings', 'mean of settings, 95% interval, wins'),
        *('pairs', 'mean of pairs, 95% interval clustered by setting'),
        'step',
    ]
    rows = []
    for arm in overall:
        pairs = arm.pairs
        clustered = with_interval(*clustered_interval(pairs))
        count = sum(map(len, pairs))
        rows.append([arm.name, len(pairs), arm.difference, count, clustered,
                     _step(arm)])  # fmt: skip
    return text.table(head, rows)


def _step(effect: Effect | Overall) -> str:
    return '' if effect.step is None else f'{effect.step:.2f}'
