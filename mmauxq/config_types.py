"""What the ``type`` of a config section names, however it is written."""

from typing import Any

JOINT = 'mmauxq.JointQAT'


def type_name(kind: Any) -> str:
    """``'X'`` for a class of MMEngine, ``'package.X'`` for one of others.

    Args:
        kind: A name in a registry, with or without its scope; the class
            itself, as in a new-style config; or its path, as in one that was
            dumped. Anything else gives a text that names no class.
    """
    name = kind if isinstance(kind, str) else _path(kind)
    package, _, rest = name.partition('.')
    last = name.rpartition('.')[2]
    return last if package == 'mmengine' or not rest else f'{package}.{last}'


def _path(kind: Any) -> str:
    return f'{getattr(kind, "__module__", "")}.{getattr(kind, "__name__", "")}'


def with_names(value: Any) -> Any:
    """A section of a config as plain dicts, lists and values, where classes
    are named as :func:`type_name` does; ``None`` in place of other objects."""
    if isinstance(value, dict):
        return {str(k): with_names(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_names(v) for v in value]
    if isinstance(value, type):
        return type_name(value)
    plain = isinstance(value, (bool, int, float, str))
    return value if plain else None


def joint_section(model: Any) -> dict | None:
    """The section of :class:`mmauxq.algorithms.JointQAT` in the ``model`` of a
    config, also where another model wraps it, as for test-time augmentation;
    ``None`` if there is none."""
    while isinstance(model, dict):
        if type_name(model.get('type')) == JOINT:
            return model
        model = model.get('module')
    return None
