"""Which part of a config an error comes from."""

from collections.abc import Iterator
from typing import Any


def locate(error: BaseException, cfg: dict) -> str:
    """``'key.of.the.part={...}'``, or ``''`` if it cannot be told.

    Builders of other packages say what they did not like, but not where it
    stands. The part is what the innermost function of the traceback was
    called with that occurs in the config.

    Args:
        error: With its traceback.
        cfg: The config of the run.
    """
    parts = list(_parts(cfg))
    for values in _values_of_frames(error):
        found = {
            path: part
            for value in values
            for path, part in parts
            if value is part or _same(value, part, path)
        }
        # a function that is given many parts, such as Runner.__init__,
        # tells nothing; nor do equal parts
        if len(found) == 1:
            path, part = found.popitem()
            return f'{path}={_short(part)}'
    return ''


def _parts(value: Any, prefix: str = '') -> Iterator[tuple[str, dict]]:
    """(dotted path, dict) of all dicts inside, the innermost first."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, inner in items:
        yield from _parts(inner, f'{prefix}.{key}' if prefix else str(key))
    if prefix and isinstance(value, dict) and value:
        yield prefix, value


def _values_of_frames(error: BaseException) -> Iterator[list[dict]]:
    """The dicts among the local variables, from the innermost frame on."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        yield [
            value
            for value in frame.f_locals.values()
            if isinstance(value, dict) and value
        ]


def _same(value: dict, part: dict, path: str) -> bool:
    """Equal, or of one type and with what was there and more.

    MMEngine hands parts down to others (data preprocessor, scope), and
    mmpretrain gives a data preprocessor its type.
    """
    if path == 'data_preprocessor':
        part = {'type': value.get('type'), **part}
    try:
        if value.keys() == part.keys():
            return bool(value == part)
        return (
            'type' in part
            and value.get('type') == part['type']
            and all(value.get(key) == part[key] for key in part)
        )
    except Exception:  # an == of its own, as arrays have
        return False


def _short(part: dict, width: int = 160) -> str:
    text = ' '.join(str(dict(part)).split())
    return text if len(text) <= width else f'{text[: width - 4]}...}}'
