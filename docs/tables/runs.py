"""Finished runs of a comparison, and differences between its arms."""

from pathlib import Path

from mmauxq.compare.comparison import by_arm, collect
from mmauxq.compare.statistics import (
    PairedDifference,
    paired_difference,
    spread,
    with_interval,
)
from mmauxq.text import table

from .records import LOGS

Arm = tuple[str, str]
"""Name of the records of a comparison, and of one of its arms."""


def finals(folder: Path) -> dict[str, dict[int, float]]:
    """Arm -> seed -> final top-1 in percent."""
    return {
        arm: {seed: run['final'] for seed, run in runs.items()}
        for arm, runs in by_arm(collect(folder)).items()
    }


def top1_by_seed(arm: Arm) -> dict[int, float]:
    """Seed -> final top-1 in percent."""
    folder, name = arm
    return finals(LOGS / folder)[name]


def paired(a: dict[int, float], b: dict[int, float]) -> PairedDifference:
    """Over the seeds that both have."""
    seeds = sorted(set(a) & set(b))
    return paired_difference([a[s] for s in seeds], [b[s] for s in seeds])


def difference(folder: Path, arm: str, reference: str) -> PairedDifference:
    """An arm beside another one of its comparison."""
    found = finals(folder)
    return paired(found[arm], found[reference])


def beside(arm: Arm, other: Arm) -> PairedDifference:
    """An arm beside one of the same or of another comparison, whose runs
    began with the same float networks."""
    return paired(top1_by_seed(arm), top1_by_seed(other))


def side(found: PairedDifference, value: float = 0.0) -> int:
    """1 if the interval lies above a value, -1 below it, 0 around it."""
    least = found.mean - found.half_width
    most = found.mean + found.half_width
    return (least > value) - (most < value)


def without_wins(found: PairedDifference) -> str:
    """Such as ``+0.22 [+0.08, +0.36]``."""
    return with_interval(found.mean, found.half_width)


def with_wins(found: PairedDifference) -> str:
    """Such as ``+0.22 [+0.08, +0.36], 5 of 5``."""
    return str(found).removesuffix(' above')


def arms(
    folder: Path,
    names: dict[str, str],
    reference: str,
    head: tuple[str, str, str],
    wins: bool = True,
) -> str:
    """A table with a row for each arm: :func:`arm_rows` below ``head``."""
    return table(head, arm_rows(folder, names, reference, wins))


def arm_rows(
    folder: Path, names: dict[str, str], reference: str, wins: bool = True
) -> list[list[str]]:
    """What each arm is, its final top-1, and the difference to another arm.

    Args:
        folder: Of the comparison.
        names: Arm -> what it is.
        reference: Arm that the others are beside.
        wins: Whether the number of seeds above the reference is told.
    """
    found, shown = finals(folder), with_wins if wins else without_wins
    lines = []
    for arm, name in names.items():
        beside = ''
        if arm != reference:
            beside = shown(paired(found[arm], found[reference]))
        lines.append([name, spread(list(found[arm].values())), beside])
    return lines
