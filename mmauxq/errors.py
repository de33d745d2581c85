"""The errors that end a command in one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(ValueError):
    """An argument, option or file is wrong.

    The message is one line, ``WHERE: expected X, got Y``, and says what would
    help. The commands print it without a traceback and exit with status 2.
    """


class TrainingError(RuntimeError):
    """A run cannot go on, for a reason outside of its arguments.

    Numbers that are not finite, a full disk, a data loader that died: the
    message is one line and says what and where. The commands print it without
    a traceback and exit with status 1.
    """


def unknown_name(
    place: str, got: object, expected: Iterable[str], alike: float = 0.6
) -> UsageError:
    """The error for a name that does not exist.

    Args:
        place: The dotted path in a config, or an option.
        got: The unknown name.
        expected: All known names, in the order of the message.
        alike: Similarity, 0 to 1, from which the nearest one is suggested.

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
