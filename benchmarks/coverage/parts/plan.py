"""Which parts are tried: those of the registries, as the tables say."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from mmauxq.errors import UsageError

from . import evaluation, hooks, tools, training, variants
from .part import Part, Row
from .registries import registered_parts, shipped_tools
from .trial import try_part

TABLES = (hooks, training, evaluation, tools, variants)


def known_parts() -> list[Part]:
    """All rows of the tables."""
    return [part for table in TABLES for part in table.PARTS]


def plan(
    patterns: Sequence[str] = (),
    known: Iterable[Part] | None = None,
    present: dict[str, str] | None = None,
) -> dict[str, Callable[[Path], Row]]:
    """What is tried.

    Args:
        patterns: Names, or shell patterns of them; all if empty.
        known: By default :func:`known_parts`.
        present: Name of a part -> where it comes from; by default what the
            registries and the folder of tools hold now.

    Returns:
        Name of a row -> what gives the row, given the folder to work in.

    Raises:
        UsageError: If a pattern matches nothing.
    """
    known = known_parts() if known is None else list(known)
    present = installed_parts() if present is None else present
    trials: dict[str, Callable[[Path], Row]] = {}
    tried = {part.registered for part in known}
    for part in known:
        if part.kind == 'variants':
            source = 'configs of users'
        elif part.registered in present:
            source = present[part.registered]
        else:
            trials[part.name] = partial(
                _without, part.name, 'is not installed', ''
            )
            continue
        trials[part.name] = partial(try_part, part, source)
    for name, source in present.items():
        if name not in tried:
            trials[name] = partial(
                _without, name, 'no table says how to try it', source
            )
    chosen = {
        name: trial
        for name, trial in trials.items()
        if not patterns
        or any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in trials):
            raise UsageError(
                'expected a name of --list, or a pattern of some, got '
                f'{pattern!r}'
            )
    return chosen


def installed_parts() -> dict[str, str]:
    """Name -> where it comes from, of all parts that can be tried."""
    shipped = shipped_tools()
    left_out = tools.CONVERTERS | tools.OTHERS
    return {
        **registered_parts(),
        **{k: v for k, v in shipped.items() if k not in left_out},
        'tools/ImageClassificationInferencer': 'mmpretrain.apis',
    }


def _without(name: str, reason: str, source: str, out: Path) -> Row:
    """The row of a part that is not tried."""
    return Row(name, source, reason=reason)
