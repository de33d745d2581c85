"""What a comparison reads back from its files, checked before it is used."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mmauxq.errors import UsageError, shorten
from mmauxq.files import parse_json

ARM = re.compile(r'[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,63}')
ARM_RULE = (
    'a name of at most 64 letters, digits and _ - . + that begins with no dot'
)
TOP1 = 'accuracy/top1'
MOST_SEED = 2**32 - 1
LARGEST = sys.float_info.max


def is_arm(name: Any) -> bool:
    """Whether a name of an arm is one, which can also name its folder."""
    return isinstance(name, str) and ARM.fullmatch(name) is not None


def commit() -> str | None:
    """The commit of this package, if it is in a clone and git is there."""
    words = ['git', '-C', str(Path(__file__).parent), 'rev-parse', 'HEAD']
    try:
        git = subprocess.run(words, capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None


def check_seeds(seeds: Sequence[int], option: str = '--seeds') -> None:
    """Raise a UsageError if a seed is out of range, or comes twice."""
    for place, seed in enumerate(seeds):
        if not 0 <= seed <= MOST_SEED:
            raise UsageError(
                f'{option}: expected integers from 0 to {MOST_SEED}, got '
                f'{seed}'
            )
        if seed in seeds[:place]:
            raise UsageError(f'{option}: {seed} is given twice')


def _integer(least: int, most: int = 2**63) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _number(most: float = LARGEST) -> Callable[[Any], bool]:
    # NaN is in no range
    return lambda value: type(value) in (int, float) and 0 <= value <= most


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list) and value != [] and all(map(holds, value))
    )


def _is_cost(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    guidance = 'guidance_parameters', 'guidance_multiply_adds'
    return not value or (
        _list_of(_integer(1))(value.get('shape'))
        and all(_integer(1)(value.get(k)) for k in COUNTS)
        and all(_integer(0)(value.get(k)) for k in guidance)
    )


def _is_gradients(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return not value or (
        'student' in value
        and all(
            isinstance(blocks, dict) and all(map(_number(), blocks.values()))
            for blocks in value.values()
        )
    )


def is_value(value: Any) -> bool:
    """Whether a setting can be tuned over that: a text, or a number."""
    return isinstance(value, str) or (
        type(value) in (int, float) and -LARGEST <= value <= LARGEST
    )


def is_tuning(tuning: Any, held_out: Any, chosen: Any) -> bool:
    """Whether these fields of a ``comparison.json`` are in order."""
    if tuning is None:
        return not (held_out or chosen)
    if not (
        isinstance(tuning, dict)
        and isinstance(tuning.get('key'), str)
        and _list_of(is_value)(values := tuning.get('values'))
        and _integer(1)(tuning.get('hold_out'))
        and _list_of(_integer(0, MOST_SEED))(tuning.get('seeds'))
    ):
        return False
    held_out, chosen = held_out or {}, chosen or {}
    return (
        isinstance(held_out, dict)
        and isinstance(chosen, dict)
        and held_out.keys() == chosen.keys()
        and all(value in values for value in chosen.values())
        and all(
            is_arm(arm) and _list_of(PERCENT)(found)
            and len(found) == len(values)
            for arm, found in held_out.items()
        )
    )  # fmt: skip


def is_diverged(seeds: Any) -> bool:
    """Whether this field of a ``comparison.json`` is in order."""
    return isinstance(seeds, dict) and all(
        is_arm(arm) and _list_of(_integer(0, MOST_SEED))(found)
        for arm, found in seeds.items()
    )


COUNTS = 'parameters', 'multiply_adds'
PERCENT = _number(100)
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    'arm': (is_arm, ARM_RULE),
    'seed': (_integer(0, MOST_SEED), f'an integer from 0 to {MOST_SEED}'),
    'final': (PERCENT, 'a number from 0 to 100'),
    'best': (PERCENT, 'a number from 0 to 100'),
    'accuracy': (_list_of(PERCENT), 'a list of numbers from 0 to 100'),
    'step_seconds': (_number(), 'a finite number from 0'),
    'cost': (_is_cost, 'shape, parameters and multiply-adds, or {}'),
    'gradients': (_is_gradients, 'norms of blocks by loss, or {}'),
    'peak_memory': (_integer(0), 'an integer from 0'),
    'shared': (lambda value: isinstance(value, bool), 'true or false'),
    'gpu': (lambda v: v is None or isinstance(v, str), 'a name or null'),
    'metric': (lambda value: isinstance(value, str), 'a name'),
    'float_final': (
        lambda value: value is None or PERCENT(value),
        'a number from 0 to 100, or null',
    ),
}
LATER = {
    'peak_memory': 0,
    'shared': False,
    'gpu': None,
    'metric': TOP1,
    'float_final': None,
}
"""What records of early versions do not have."""


def check_metric(name: str, found: dict) -> None:
    """Raise a UsageError unless a validation gave this metric, in percent.

    Args:
        name: Of the metric, such as ``'accuracy/top1'``.
        found: Name -> value of all that it gave.
    """
    known = [key for key, value in found.items() if PERCENT(value)]
    if name not in known:
        raise UsageError(
            '--metric: expected one that the validation gives in percent, '
            f'{" or ".join(known) or "and there is none"}, got {name!r}'
        )


def metric(records: Sequence[dict]) -> str:
    """What the runs of a comparison are measured by, for people."""
    name = records[0].get('metric', TOP1)
    return 'top-1' if name == TOP1 else name


def check_record(record: Any, place: object) -> dict:
    """The record of a finished run, or a UsageError that begins with
    ``place``."""
    if not isinstance(record, dict):
        raise UsageError(
            f'{place}: expected the record of a run, got {shorten(record, 60)}'
        )
    for name, (holds, what) in FIELDS.items():
        value = record.get(name, LATER.get(name))
        if not holds(value):
            got = shorten(value, 60) if name in record else 'nothing'
            raise UsageError(f'{place}: {name}: expected {what}, got {got}')
    return record


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UsageError: If it cannot be read, or is none.
    """
    return _parse(_read(file), file)


def read_result(file: Path) -> dict:
    """The record in ``runs/ARM/SEED/result.json``.

    Raises:
        UsageError: If it is damaged, or of another run.
    """
    record = check_record(read_json(file), file)
    *_, arm, seed, _ = file.absolute().parts
    if (record['arm'], str(record['seed'])) != (arm, seed):
        raise UsageError(
            f'{file}: expected the record of arm {arm!r}, seed {seed}, got '
            f'that of arm {record["arm"]!r}, seed {record["seed"]}'
        )
    return record


def read_lines(file: Path) -> list[dict]:
    """The records in a ``results.jsonl``; a UsageError names file and line."""
    records = []
    for number, line in enumerate(_read(file).splitlines(), 1):
        place = f'{file}, line {number}'
        records.append(check_record(_parse(line, place), place))
    return records


def check_together(records: Iterable[dict], place: object) -> None:
    """Raise a UsageError if a run comes twice, or the runs of an arm differ
    in the number of epochs or in their blocks, or any in their metric."""
    seen: dict[str, dict[int, tuple]] = {}
    metrics = set()
    for record in records:
        metrics.add(record.get('metric', TOP1))
        if len(metrics) > 1:
            raise UsageError(
                f'{place}: expected runs of one metric, got '
                f'{" and ".join(sorted(metrics))}; choose another folder'
            )
        arm, seed = record['arm'], record['seed']
        runs = seen.setdefault(arm, {})
        if seed in runs:
            raise UsageError(f'{place}: arm {arm!r} has seed {seed} twice')
        blocks = {key: list(v) for key, v in record['gradients'].items()}
        runs[seed] = len(record['accuracy']), blocks
        if runs[seed] != next(iter(runs.values())):
            raise UsageError(
                f'{place}: arm {arm!r}: seed {seed} differs in its epochs or '
                f'blocks from seed {next(iter(runs))}'
            )


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise UsageError(f'{file}: cannot be read ({error})') from error


def _parse(text: str, place: object) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise UsageError(f'{place}: expected JSON ({error})') from error
