"""Which part of a config an error comes from."""

from collections.abc import Iterator
from typing import Any

from mmauxq.errors import shorten


def walk(value: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in nested dicts and lists."""
    if path:
        yield path, value
    items: Any = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, inner in items:
        yield from walk(inner, f'{path}.{key}' if path else str(key))


def locate(error: BaseException, cfg: dict) -> str:
    """``'key.of.the.section={...}'``, or ``''`` if it cannot be told.

    Builders of other packages say what they did not like, but not where it
    stands. The section is what the innermost function of the traceback that
    was called with a part of the config has it from.

    Args:
        error: With its traceback.
        cfg: The config of the run.
    """
    parts = dict(walk(cfg))
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        sections = {
            _section(path, part)
            for name, value in frame.f_locals.items()
            for path, part in parts.items()
            if _is_part(name, value, path, part)
        }
        # a function that is given many sections, such as Runner.__init__,
        # tells nothing; nor do equal ones
        if len(sections) == 1:
            path = sections.pop()
            return f'{path}={shorten(parts[path], 160)}'
    return ''


def _section(path: str, part: Any) -> str:
    """The dict or list that a part belongs to, which may be itself."""
    if not isinstance(part, dict) and not _has_dicts(part):
        return path.rpartition('.')[0] or path
    return path


def _has_dicts(part: Any) -> bool:
    return isinstance(part, list) and any(isinstance(p, dict) for p in part)


def _is_part(name: str, value: Any, path: str, part: Any) -> bool:
    """Whether a local variable is a part of the config.

    A section is known by its content, another value by its content and its
    key. MMEngine hands sections down with more than they had (data
    preprocessor, scope), and mmpretrain gives a data preprocessor its type.
    """
    try:
        if isinstance(value, dict) and isinstance(part, dict) and part:
            if path == 'data_preprocessor':
                part = {'type': value.get('type'), **part}
            return bool(value == part) or (
                'type' in part
                and value.get('type') == part['type']
                and all(value.get(key) == part[key] for key in part)
            )
        known = path.rpartition('.')[2] == name or _has_dicts(part)
        return known and type(value) is type(part) and bool(value == part)
    except Exception:  # an == of its own, as arrays have
        return False
