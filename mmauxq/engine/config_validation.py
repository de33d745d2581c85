"""What is checked of a config before anything is built.

Mainly the sections of this package, because Python's message on a wrong
keyword names neither place nor alternatives. Arguments of other packages are
theirs to check: only what they would misread, or refuse after hours, is
listed here.
"""

import inspect
import math
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import Registry
from mmengine.runner import BaseLoop, Runner
from mmengine.utils import get_object_from_string

from mmauxq import registry
from mmauxq.errors import UsageError, one_line, shorten, unknown_name
from mmauxq.guidance import Guidance
from mmauxq.quantizers import Quantizer

from .error_context import walk

SCOPE = 'mmauxq'
ALIKE = 0.8
"""Similarity of a class to suggest; all names share the scope's letters."""
MARKS = {'type', '_scope_', '_delete_'}
BUILDERS: dict[type, tuple[set[str], set[str]]] = {
    Guidance: (set(), {'num_classes', 'network', 'data_preprocessor'}),
    Quantizer: ({'per_channel'}, {'role', 'num_channels', 'channel_axis'}),
    Hook: ({'priority'}, set()),
    BaseLoop: ({'by_epoch'}, {'runner', 'dataloader'}),
    OptimWrapper: ({'constructor', 'paramwise_cfg'}, set()),
}
"""Base class -> keys that its builder takes out of a section, and arguments
that the builder adds to it."""
VARIADIC = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
RUN_SETTINGS = set(inspect.signature(Runner).parameters) | {
    'activation_checkpointing',
    'compile',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'sync_bn',
}
"""What a run reads of a config."""


# --- KEY=VALUE of a command line -------------------------------------------


def merge_options(cfg: Config, options: dict[str, Any], source: str) -> None:
    """MMEngine's merge into ``cfg``, with errors that name the key.

    Args:
        cfg: Changed.
        options: Values by their dotted keys; elements of lists have numbers.
        source: Where they come from, for the messages.

    Raises:
        UsageError: If a key leads nowhere, or its first part is no name in
            the config and no argument of MMEngine's runner.
    """
    for key, value in options.items():
        # MMEngine would make a new variable of it, which nothing reads
        top, *_ = key.split('.')
        if top not in cfg and top not in RUN_SETTINGS:
            raise unknown_name(f'{source} {key}', top, sorted(cfg))
        outer, _, last = key.rpartition('.')
        owner = dict(walk(cfg._cfg_dict)).get(outer)
        if isinstance(owner, list):  # MMEngine merges dicts alone
            if last not in map(str, range(len(owner))):
                raise UsageError(
                    f'{source} {key}: expected a number below {len(owner)} '
                    f'after {outer}, got {last!r}'
                )
            owner[int(last)] = value
            continue
        try:
            cfg.merge_from_dict({key: value})
        except (TypeError, LookupError) as error:
            raise UsageError(f'{source} {key}: {one_line(error)}') from error


# --- the model and the settings of a training ------------------------------


def check_model(cfg: Config, path: str) -> None:
    """Raise a UsageError if the config from a file has no classifier."""
    model = cfg.get('model')
    if not isinstance(model, dict):
        raise UsageError(f'{path} has no `model`')
    network = model.get('architecture', model)
    if not isinstance(network, dict):
        raise UsageError(
            'model.architecture: expected the config of a classifier, got '
            f'{network!r}'
        )
    if 'type' not in network or 'type' not in model:
        raise UsageError(f'{path} has no classifier: `model` has no `type`')
    if 'backbone' in network and not network.get('head'):
        raise UsageError(
            f'{path} has no classifier: `model` has a backbone but no head'
        )


def _is_topk(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) and value else [value]
    return all(type(k) is int and k >= 1 for k in values)


KINDS: dict[str, Callable[[Any], bool]] = {
    'a dict': lambda v: isinstance(v, dict),
    'a dict or None': lambda v: v is None or isinstance(v, dict),
    'a list or None': lambda v: v is None or isinstance(v, (list, tuple)),
    'a path or None': lambda v: v is None or isinstance(v, str),
    'True or False': lambda v: isinstance(v, bool),
    'an integer from 1': lambda v: type(v) is int and v >= 1,
    'an integer from 0': lambda v: type(v) is int and v >= 0,
    'a finite number from 0': (
        lambda v: type(v) in (int, float) and 0 <= v < math.inf
    ),
    'an integer from 1, or a list of them': _is_topk,
}
RULES = [
    # Another value is taken for an object that is built already; it fails in
    # another part of the config, which the message would name.
    (
        r'optim_wrapper|(train|val|test)_dataloader\.(dataset|sampler)|'
        r'train_cfg|train_dataloader',
        'a dict',
    ),
    (r'(val|test)_dataloader|default_hooks', 'a dict or None'),
    (r'custom_hooks', 'a list or None'),
    # A number is taken for the name of a file.
    (r'load_from', 'a path or None'),
    # None takes out a hook that MMEngine has by itself; for another one it
    # ends in an assertion without words.
    (
        r'default_hooks\.(?!(runtime_info|timer|sampler_seed|logger|'
        r'param_scheduler|checkpoint)$)\w+',
        'a dict',
    ),
    # Any text is true, also 'False'.
    (
        r'resume|randomness\.(deterministic|diff_rank_seed)|'
        r'(train_cfg|param_scheduler(\.\d+)?)\.'
        r'(by_epoch|convert_to_iter_based)|'
        r'default_hooks\.checkpoint\.(by_epoch|save_last|save_optimizer|'
        r'save_param_scheduler)|\w+_dataloader\.(pin_memory|'
        r'persistent_workers|sampler\.(shuffle|round_up))',
        'True or False',
    ),
    # 0 trains nothing, or divides by zero after an epoch; a negative interval
    # validates always.
    (r'train_cfg\.(max_(epochs|iters)|val_interval)', 'an integer from 1'),
    # Compared with NaN, no validation and no schedule ever begins.
    (r'train_cfg\.val_begin|\w+_dataloader\.num_workers', 'an integer from 0'),
    (r'param_scheduler(\.\d+)?\.(begin|end)', 'a finite number from 0'),
    # 0 is the accuracy of no guess; others fail in the first validation.
    (
        r'(val|test)_evaluator(\.\d+)?\.topk',
        'an integer from 1, or a list of them',
    ),
]
"""(Pattern of dotted paths, which kind of value they take)."""
NEEDED = [
    ('train_dataloader', 'dataset'),
    ('val_dataloader', 'dataset'),
    # Without, torch serves one image at a time.
    ('train_dataloader', 'batch_size'),
    ('val_dataloader', 'batch_size'),
    # Without, MMEngine takes all other keys for names of optimizers.
    ('optim_wrapper', 'optimizer'),
]


def check_settings(cfg: Config, path: str) -> None:
    """Raise a UsageError if MMEngine would misread settings of a training.

    Args:
        cfg: Of a training.
        path: Of its file, for messages.
    """
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
        if cfg.get(key) is None:
            raise UsageError(f'{path} has no `{key}`')
    loop = cfg.train_cfg  # without, MMEngine would count iterations
    if isinstance(loop, dict) and not {'by_epoch', 'type'} & set(loop):
        raise UsageError(
            f'train_cfg: expected `by_epoch` or `type`, got {shorten(loop)}'
        )
    for place, value in walk(cfg._cfg_dict):
        for pattern, expected in RULES:
            if re.fullmatch(pattern, place) and not KINDS[expected](value):
                raise UsageError(
                    f'{place}: expected {expected}, got {shorten(value)}'
                )
    for section, key in NEEDED:
        part = cfg.get(section)
        if part is None or part.get(key) is not None:
            continue
        if key != 'batch_size' or not part.get('batch_sampler'):
            raise UsageError(f'{section} has no `{key}`')


# --- sections of this package ----------------------------------------------


def settle_own_sections(cfg: Config) -> None:
    """Give all sections the scope of their class, and check ours.

    What was inherited through ``_base_ = 'mmauxq::...'`` carries
    ``_scope_='mmauxq'``, in which MMEngine finds no class of MMPretrain. This
    mark is removed from ``cfg``: our classes are written ``mmauxq.X``.

    Raises:
        UsageError: If ``mmauxq.X`` does not exist, or a section has a key
            that its class does not take.
    """
    names = own_names()
    # other names in a config are variables, which no run reads
    run = {k: v for k, v in cfg._cfg_dict.items() if k in RUN_SETTINGS}
    for place, section in walk(run):
        if not isinstance(section, dict):
            continue
        kind = section.get('type')
        if section.get('_scope_') == SCOPE:
            del section['_scope_']
            if isinstance(kind, str) and f'{SCOPE}.{kind}' in names:
                kind = section['type'] = f'{SCOPE}.{kind}'
        ours = isinstance(kind, str) and re.fullmatch(r'mmauxq\.[^.]*', kind)
        if ours and kind not in names:
            raise unknown_name(
                f'{place}.type', kind, _relatives(kind, names), ALIKE
            )
        cls = own_class(kind)
        if cls is not None:
            _check_keys(place, section, cls)


def own_names() -> dict[str, Callable]:
    """``'mmauxq.X'`` -> class or function, over all of our registries."""
    found: dict[str, Callable] = {}
    for node in vars(registry).values():
        if isinstance(node, Registry) and node.scope == SCOPE:
            node.import_from_location()
            found |= {f'{SCOPE}.{k}': v for k, v in node.module_dict.items()}
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
    if kind.startswith(f'{SCOPE}.'):
        return own_names().get(kind) or get_object_from_string(kind)
    return None


def arguments_of(cls: Callable) -> list[str] | None:
    """Names of all arguments of a class, those of ``**kwargs`` included.

    Returns:
        The class's own first; ``None`` if the last ``**kwargs`` takes
        anything.
    """
    owners = [cls]
    if inspect.isclass(cls):  # what object takes is nothing
        classes = cls.__mro__[:-1]
        owners = [o.__init__ for o in classes if '__init__' in vars(o)]
    found: list[str] = []
    for owner in owners:
        parameters = inspect.signature(owner).parameters
        found += [k for k, p in parameters.items() if p.kind not in VARIADIC]
        if all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
            break
    else:
        return None if owners else []
    return [name for name in dict.fromkeys(found) if name != 'self']


def _relatives(kind: str, names: dict[str, Callable]) -> list[str]:
    """The names of the package that the nearest one belongs to, or all."""
    package = {n: c.__module__.rpartition('.')[0] for n, c in names.items()}
    near = get_close_matches(kind, names, 1, ALIKE)
    return [n for n in names if not near or package[n] == package[near[0]]]


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
