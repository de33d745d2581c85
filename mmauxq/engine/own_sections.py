"""The sections of a config that belong to this package.

MMEngine hands a dict to the class of its ``type`` and shows whatever Python
says of a wrong keyword, with the whole section and without its place; a
misspelt class is "not in the registry". Here all sections of our own classes
are looked through before anything is built.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import Registry
from mmengine.runner import BaseLoop

from mmauxq import registry
from mmauxq.errors import unknown_name
from mmauxq.guidance import Guidance
from mmauxq.quantizers import Quantizer

from .options import settings_of_a_run

SCOPE = 'mmauxq'
ALIKE = 0.8
"""Of two names of classes; seven letters are those of the scope."""
MARKS = {'type', '_scope_', '_delete_'}
BUILDERS: dict[type, tuple[set[str], set[str]]] = {
    Guidance: (set(), {'head', 'num_classes', 'network', 'data_preprocessor'}),
    Quantizer: ({'per_channel'}, {'role', 'num_channels', 'channel_axis'}),
    Hook: ({'priority'}, set()),
    BaseLoop: ({'by_epoch'}, {'runner', 'dataloader'}),
    OptimWrapper: ({'constructor', 'paramwise_cfg'}, set()),
}
"""Base class -> keys that its builder takes out of a section, and arguments
that the builder gives, not the section."""


def settle_own_sections(cfg: Config) -> None:
    """Make the sections of a config ours or MMPretrain's, and check ours.

    What was inherited through ``_base_ = 'mmauxq::...'`` carries
    ``_scope_='mmauxq'``, in which MMEngine finds no class of MMPretrain. Our
    classes are written ``mmauxq.X`` everywhere, so that the mark says
    nothing: it is removed from ``cfg``.

    Raises:
        UsageError: If ``mmauxq.X`` does not exist, or a section has a key
            that its class does not take.
    """
    names = own_names()
    for place, section in _sections(cfg):
        kind = section.get('type')
        if section.get('_scope_') == SCOPE:
            del section['_scope_']
            if isinstance(kind, str) and kind in names:
                kind = section['type'] = f'{SCOPE}.{kind}'
        if isinstance(kind, str) and _is_misspelt(kind, names):
            raise unknown_name(
                f'{place}.type', kind, _relatives(kind, names), ALIKE
            )
        cls = own_class(kind)
        if cls is not None:
            _check_keys(place, section, cls)


def own_names() -> dict[str, Callable]:
    """Registered name -> class or function, over all of our registries."""
    found: dict[str, Callable] = {}
    for node in vars(registry).values():
        if isinstance(node, Registry) and node.scope == SCOPE:
            node.import_from_location()
            found |= node.module_dict
    return dict(sorted(found.items()))


def own_class(kind: Any) -> Callable | None:
    """What a ``type`` names, if that is ours.

    Args:
        kind: ``'mmauxq.X'``; the class itself, as in a new-style config; or
            ``'mmauxq.package.X'``, as in one that was dumped.
    """
    if not isinstance(kind, str):
        module = getattr(kind, '__module__', None) or ''
        return kind if module.split('.')[0] == SCOPE else None
    module, _, name = kind.rpartition('.')
    if module == SCOPE:
        return own_names().get(name)
    if module.startswith(f'{SCOPE}.'):
        try:
            return getattr(importlib.import_module(module), name, None)
        except ImportError:
            return None
    return None


def arguments_of(cls: Callable) -> list[str] | None:
    """Names of all arguments of a class, those of ``**kwargs`` included.

    Returns:
        In the order of the signatures, the class's own first; ``None`` if
        the last ``**kwargs`` takes anything.
    """
    owners = [cls]
    if inspect.isclass(cls):
        owners = [o.__init__ for o in cls.__mro__ if '__init__' in vars(o)]
        owners.pop()  # that of object takes nothing
    found: dict[str, None] = {}
    for owner in owners:
        parameters = inspect.signature(owner).parameters.values()
        found |= dict.fromkeys(
            p.name
            for p in parameters
            if p.name != 'self'
            and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        )
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            return list(found)
    return None if owners else []


def _is_misspelt(kind: str, names: dict[str, Callable]) -> bool:
    scope, _, name = kind.partition('.')
    return scope == SCOPE and '.' not in name and name not in names


def _relatives(kind: str, names: dict[str, Callable]) -> list[str]:
    """The names of the package that the nearest one belongs to, or all."""
    packages = {
        f'{SCOPE}.{name}': cls.__module__.rpartition('.')[0]
        for name, cls in names.items()
    }
    near = get_close_matches(kind, packages, 1, ALIKE)
    return [
        name
        for name, package in packages.items()
        if not near or package == packages[near[0]]
    ]


def _check_keys(place: str, section: dict, cls: Callable) -> None:
    known = arguments_of(cls)
    if known is None:
        return  # it says itself what it does not take
    for base, (taken, given) in BUILDERS.items():
        if inspect.isclass(cls) and issubclass(cls, base):
            known = [name for name in known if name not in given]
            known += sorted(taken)
    for key in section:
        if key not in MARKS and key not in known:
            raise unknown_name(place, key, known)


def _sections(cfg: Config) -> Iterator[tuple[str, dict]]:
    """(dotted path, dict) of what a run reads; no other variables."""
    run = settings_of_a_run()
    for key, value in cfg._cfg_dict.items():
        if key in run:
            yield from _dicts(value, key)


def _dicts(value: Any, place: str) -> Iterator[tuple[str, dict]]:
    items: Any = ()
    if isinstance(value, dict):
        yield place, value
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, inner in items:
        yield from _dicts(inner, f'{place}.{key}')
