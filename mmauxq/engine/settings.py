"""What settings of MMEngine may be; MMEngine itself finds out late or never.

A wrong one would end in a traceback somewhere in the run, or be taken for
something else. Settings that are not listed are checked by whom they belong
to.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from mmengine.config import Config

from mmauxq.errors import UsageError

LEVELS = ('CRITICAL', 'ERROR', 'WARNING', 'INFO', 'DEBUG', 'NOTSET')
MOST_WORKERS = 256


def _integer(least: int, most: float = math.inf) -> tuple[Callable, str]:
    def good(value: Any) -> bool:
        return (
            isinstance(value, int)
            and not isinstance(value, bool)
            and least <= value <= most
        )

    upper = '' if most == math.inf else f' to {most}'
    return good, f'an integer from {least}{upper}'


def _number(least: float, most: float = math.inf) -> tuple[Callable, str]:
    def good(value: Any) -> bool:
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and math.isfinite(value)
            and least <= value <= most
        )

    upper = '' if most == math.inf else f' to {most}'
    return good, f'a finite number from {least}{upper}'


def _or_none(rule: tuple[Callable, str]) -> tuple[Callable, str]:
    good, allowed = rule
    return lambda value: value is None or good(value), f'{allowed}, or None'


def _kind(allowed: str, *types: type) -> tuple[Callable, str]:
    return lambda value: isinstance(value, types), allowed


SECTION = _kind('a dict', dict)
LIST = _kind('a list', list, tuple)
TEXT = _kind('text', str)
BOOL = _kind('True or False', bool)
# Arguments of other packages' classes are theirs to check: what is not
# allowed for one class is right for another. Here is what MMEngine reads
# itself, and would misread or stumble over after hours.
RULES = [
    # what it takes apart itself; another type ends in a traceback of its own
    (r'model|optim_wrapper|train_cfg|train_dataloader', SECTION),
    (r'randomness|env_cfg', SECTION),
    (r'optim_wrapper\.optimizer', SECTION),
    (r'(val|test)_(cfg|dataloader)', _or_none(SECTION)),
    (r'(train|val|test)_dataloader\.(dataset|sampler)', SECTION),
    (r'data_preprocessor', _or_none(SECTION)),
    (r'default_hooks', _or_none(SECTION)),
    # None takes out one of MMEngine's own
    (r'default_hooks\.(runtime_info|timer|sampler_seed|logger|'
     r'param_scheduler|checkpoint)', _or_none(SECTION)),
    (r'default_hooks\.(?!(runtime_info|timer|sampler_seed|logger|'
     r'param_scheduler|checkpoint)$)\w+', SECTION),
    (r'custom_hooks\.\d+', SECTION),
    (r'custom_hooks', _or_none(LIST)),
    (
        r'param_scheduler|(val|test)_evaluator',
        _or_none(_kind('a dict or a list of them', dict, list, tuple)),
    ),
    (r'(param_scheduler|(val|test)_evaluator)\.\d+', SECTION),
    # 0 trains nothing, or divides by zero after an epoch
    (r'train_cfg\.(max_(epochs|iters)|val_interval)', _integer(1)),
    (r'train_cfg\.val_begin', _integer(0)),
    (r'optim_wrapper\.accumulative_counts', _integer(1)),
    # any text, also 'False', is taken for True
    (r'train_cfg\.by_epoch', BOOL),
    (r'\w+_dataloader\.(drop_last|persistent_workers|pin_memory)', BOOL),
    (r'\w+_dataloader\.sampler\.(shuffle|round_up)', BOOL),
    (r'param_scheduler(\.\d+)?\.(by_epoch|convert_to_iter_based)', BOOL),
    (r'default_hooks\.checkpoint\.(by_epoch|save_\w*(last|optimizer|'
     r'param_scheduler))', BOOL),
    (r'randomness\.(deterministic|diff_rank_seed)', BOOL),
    (r'resume', BOOL),
    # a schedule that begins at NaN never does
    (r'param_scheduler(\.\d+)?\.(begin|end)', _number(0)),
    # True is one image at a time, and so many processes end the machine
    (r'\w+_dataloader\.batch_size', _integer(1)),
    (r'\w+_dataloader\.num_workers', _integer(0, MOST_WORKERS)),
    # a checkpoint hook fails as it saves, or never saves
    (r'default_hooks\.checkpoint\.interval',
     (lambda v: _integer(1)[0](v) or (type(v) is int and v == -1),
      'an integer from 1, or -1 for never')),
    (r'default_hooks\.checkpoint\.max_keep_ckpts', _integer(-1)),
    (r'default_hooks\.checkpoint\.save_best',
     _or_none(_kind('names of metrics', str, list, tuple))),
    (r'default_hooks\.logger\.interval', _integer(1)),
    # 0 is the accuracy of no guess, and fails after an epoch in a list
    (r'(val|test)_evaluator(\.\d+)?\.topk',
     (lambda v: all(
         _integer(1)[0](k)
         for k in (v if isinstance(v, (list, tuple)) and v else [v])),
      'integers from 1, or lists of them')),
    (r'randomness\.seed', _or_none(_integer(0, 2**32 - 1))),
    (r'load_from', _or_none(TEXT)),
    (r'log_level', (lambda v: v in LEVELS, f'one of {", ".join(LEVELS)}')),
]  # fmt: skip
NEEDED = {
    'train_dataloader': ('batch_size', 'dataset'),
    'val_dataloader': ('batch_size', 'dataset'),
    'test_dataloader': ('batch_size', 'dataset'),
    'optim_wrapper': ('optimizer',),
}
TYPED = re.compile(
    r'\w+_dataloader\.(dataset|sampler)|optim_wrapper\.optimizer|'
    r'param_scheduler(\.\d+)?|(val|test)_evaluator(\.\d+)?|'
    r'default_hooks\.\w+|custom_hooks\.\d+'
)
"""What MMEngine builds from its ``type``."""
_COMPILED = [(re.compile(pattern), *rule) for pattern, rule in RULES]


def check_settings(cfg: Config) -> None:
    """See that settings of MMEngine are of a kind that can work.

    Raises:
        UsageError: With the key, its value and what is allowed.
    """
    for path, value in _walk(cfg._cfg_dict):
        for pattern, good, allowed in _COMPILED:
            if pattern.fullmatch(path) and not good(value):
                raise UsageError(
                    f'{path}: expected {allowed}, got {_shown(value)}'
                )
        if (
            isinstance(value, dict)
            and TYPED.fullmatch(path)
            # evaluators of several metrics, schedulers of several optimizers
            and not {'type', 'metrics'} & set(value)
            and not (value and path == 'param_scheduler')
        ):
            raise UsageError(
                f'{path}: expected a dict with `type`, got '
                f'{_shown(dict(value))}, which has no `type`'
            )
    for section, keys in NEEDED.items():
        part = cfg.get(section)
        if part is None:
            continue
        missing = [key for key in keys if part.get(key) is None]
        # a batch sampler has the size, an object of its own everything
        if missing == ['batch_size'] and part.get('batch_sampler'):
            continue
        if missing:
            raise UsageError(
                f'{section} has no `{missing[0]}`; needed: {", ".join(keys)}'
            )
    for loop in ('val', 'test'):
        keys = [
            f'{loop}_{part}' for part in ('cfg', 'dataloader', 'evaluator')
        ]
        there = [key for key in keys if cfg.get(key) is not None]
        if there and len(there) < 3:
            absent = next(key for key in keys if key not in there)
            raise UsageError(
                f'{absent} is not set, but {" and ".join(there)} is; needed '
                'are all three or none'
            )
    loop = cfg.train_cfg
    if 'by_epoch' not in loop and 'type' not in loop:
        raise UsageError(
            f'train_cfg={dict(loop)} has neither `by_epoch` nor `type`; '
            'needed: one of them'
        )
    by_epoch = loop.get('by_epoch')
    length = 'max_epochs' if by_epoch else 'max_iters'
    if by_epoch is not None and length not in loop:
        raise UsageError(
            f'train_cfg={dict(loop)} has no `{length}`; needed with '
            f'by_epoch={by_epoch}'
        )


def _walk(value: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything inside, the outer first."""
    if prefix:
        yield prefix, value
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, inner in items:
        yield from _walk(inner, f'{prefix}.{key}' if prefix else str(key))


def _shown(value: Any, width: int = 120) -> str:
    text = ' '.join(repr(value).split())
    return text if len(text) <= width else f'{text[: width - 3]}...'
