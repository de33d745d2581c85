"""The errors that end a command in one line."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any


class UsageError(ValueError):
    """An argument, option or file is wrong.

    The message is one line, ``WHERE: expected X, got Y``, and says what would
    help. The commands print it without a traceback and exit with status 2.
    """


class TrainingError(RuntimeError):
    """A run cannot go on, for a reason outside of its arguments.

    Such as numbers that are not finite, or a full disk. The message is one
    line and says what and where. The commands print it without a traceback
    and exit with status 1.
    """


def check_integer(place: str, value: Any, least: int) -> None:
    """Check that the setting at a dotted path is an integer, and no bool.

    Raises:
        UsageError: If it is not, or below ``least``.
    """
    if type(value) is not int or value < least:
        raise UsageError(
            f'{place}: expected an integer from {least}, got {shorten(value)}'
        )


def check_number(
    place: str, value: Any, expected: str, fits: Callable[[float], bool]
) -> None:
    """Check that the setting at a dotted path is a number, and no bool.

    Args:
        place: Of the setting.
        value: It.
        expected: What it should be, for the message.
        fits: Whether a number is that.

    Raises:
        UsageError: If it is not.
    """
    if type(value) not in (int, float) or not fits(value):
        raise UsageError(f'{place}: expected {expected}, got {shorten(value)}')


def check_choice(place: str, value: Any, known: Iterable[str]) -> None:
    """Check that the setting at a dotted path is one of ``known`` names.

    Raises:
        UsageError: If it is not.
    """
    names = list(known)
    if value not in names:
        raise unknown_name(place, value, names)


def shorten(value: Any, width: int = 120) -> str:
    """``repr(value)`` in one line of ``width`` characters at most."""
    return _cut(repr(value), width)


def one_line(error: BaseException, width: int = 600) -> str:
    """The message of an error in one line, with its type if it is foreign."""
    text = str(error)
    if isinstance(error, KeyError):
        text = str(error.args[0])
        if len(text.split()) < 2:
            text = f'missing key {text!r}'
    elif not isinstance(error, (UsageError, TrainingError)):
        text = f'{type(error).__name__}: {text}'.removesuffix(': ')
    return _cut(text, width)


def visible(text: str, kept: str = '') -> str:
    """Text in which characters that a terminal obeys are written out.

    These are controls, such as the escape of colours and the bell, marks that
    turn the direction of a line, and bytes that are no text. What people of
    any language write stays.

    Args:
        text: From anywhere.
        kept: Controls that stay, such as a line break.
    """
    kept += '\u200c\u200d'  # letters are joined by them, or are not
    return ''.join(
        c if c.isprintable() or c in kept
        else c.encode('unicode_escape').decode()
        for c in text
    )  # fmt: skip


def _cut(text: str, width: int) -> str:
    text = visible(' '.join(text.split()))
    return text if len(text) <= width else f'{text[: width - 3]}...'


def unknown_name(
    place: str, got: object, expected: Iterable[str], alike: float = 0.6
) -> UsageError:
    """``PLACE: expected one of a, b, got 'c'; did you mean b?``.

    Args:
        place: The dotted path in a config, or an option.
        got: The unknown name.
        expected: All known names, in the order of the message.
        alike: Similarity, 0 to 1, from which the nearest one is suggested.
    """
    names = list(expected)
    near = get_close_matches(str(got), names, 1, alike)
    hint = f'; did you mean {near[0]}?' if near else ''
    return UsageError(
        f'{place}: expected one of {", ".join(names)}, got {got!r}{hint}'
    )
