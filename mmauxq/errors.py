"""The errors that end a command in one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """Something that was asked for is wrong, and the message says how.

    The message is one line: what came, what was allowed, where. The programs
    in ``tools/`` print it without a traceback and exit with status 2.
    """


class TrainingError(RuntimeError):
    """A run cannot go on, for a reason outside of what was asked for.

    Numbers that are not finite, a full disk, a data loader that died: the
    message is one line and says what and where. The programs in ``tools/``
    print it without a traceback and exit with status 1.
    """


def unknown_name(
    place: str, got: object, expected: Iterable[str], alike: float = 0.6
) -> UsageError:
    """That a name is none of those that exist, and the nearest of them.

    Args:
        place: The dotted path of a config, or an option.
        got: The name that came.
        expected: All that exist, in the order of the message.
        alike: How near the nearest must be to be named, 0 to 1.

    Returns:
        An error to raise: ``PLACE: expected one of a, b, got 'c'; did you
        mean b?``.
    """
    names = list(expected)
    near = get_close_matches(str(got), names, 1, alike)
    hint = f'; did you mean {near[0]}?' if near else ''
    return UsageError(
        f'{place}: expected one of {", ".join(names)}, got {got!r}{hint}'
    )
