"""Which part of a config an error comes from."""

import traceback
from collections.abc import Iterator
from typing import Any

from mmauxq.errors import shorten


def walk(value: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in nested dicts and lists."""
    if path:
        yield path, value
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return
    for key, inner in list(value.items()):
        yield from walk(inner, f'{path}.{key}' if path else str(key))


def locate(error: BaseException, cfg: dict) -> str:
    """``'key.of.the.section={...}'``, or ``''`` if it cannot be told.

    Builders of other packages say what is wrong, but not where it stands. The
    section is the one that the innermost function in the traceback of
    ``error`` was called with.
    """
    parts = dict(walk(cfg))
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        sections = {
            _section(path, part)
            for name, value in frame.f_locals.items()
            for path, part in parts.items()
            if _is_part(name, value, path, part)
        }
        # many sections, as in Runner.__init__, tell nothing; nor do equal ones
        if len(sections) == 1:
            path = sections.pop()
            return f'{path}={shorten(parts[path], 160)}'
    return ''


def _section(path: str, part: Any) -> str:
    """The dict or list that a part belongs to, which may be itself."""
    if isinstance(part, dict) or _has_dicts(part):
        return path
    return path.rpartition('.')[0] or path


def _has_dicts(part: Any) -> bool:
    return isinstance(part, list) and any(isinstance(p, dict) for p in part)


def _is_part(name: str, value: Any, path: str, part: Any) -> bool:
    """Whether a local variable is a part of the config.

    A section is known by its content, another value by its content and its
    key. MMEngine adds to sections as it hands them down (data preprocessor,
    scope), and mmpretrain gives a data preprocessor its type.
    """
    try:
        if isinstance(value, dict) and isinstance(part, dict) and part:
            if path == 'data_preprocessor':
                part = {'type': value.get('type'), **part}
            return bool(value == part) or (
                'type' in part and {**value, **part} == value
            )
        known = path.rpartition('.')[2] == name or _has_dicts(part)
        return known and type(value) is type(part) and bool(value == part)
    except Exception:  # an == of its own, as arrays have
        return False
