"""The arms of a comparison, as the command line gives them."""

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmauxq import compat
from mmauxq.config_types import with_names
from mmauxq.engine.config_validation import (
    check_model,
    merge_options,
    settle_own_sections,
)
from mmauxq.engine.error_context import walk
from mmauxq.engine.image_shape import set_image_shape
from mmauxq.errors import UsageError, one_line
from mmauxq.registry import MODELS

from .records import ARM_RULE, is_arm

EQUAL = (
    'train_cfg',
    'param_scheduler',
    'optim_wrapper',
    'train_dataloader',
    'val_dataloader',
    'val_evaluator',
)
"""Parts of a config in which all arms must agree: budget and yardstick."""
PRECISION = ('type', 'dtype', 'loss_scale')
"""Keys of ``optim_wrapper`` in which arms may differ."""


def read_arms(
    arms: Sequence[str], options: dict | None = None, tuned: str = ''
) -> dict[str, Config]:
    """Read the config of each arm.

    Args:
        arms: ``NAME=CONFIG``, each followed by any number of ``,KEY=VALUE``
            for this arm alone; values are JSON, or text.
        options: Overrides for all arms.
        tuned: Dotted key in which the arms may differ, as each will have a
            value of its own.

    Raises:
        UsageError: If a name cannot be one or comes twice, a file is missing
            or cannot be read, a section does not fit, or the arms differ in
            their budget.
    """
    configs: dict[str, Config] = {}
    for text in arms:
        name, _, rest = text.partition('=')
        # lists and dicts have commas of their own
        path, *own = re.split(r',(?=[A-Za-z_][\w.]*(?:=|$))', rest)
        if not name or not path:
            raise UsageError(
                f'--arms: expected NAME=CONFIG[,KEY=VALUE], got {text!r}'
            )
        if not is_arm(name):
            raise UsageError(f'--arms: expected {ARM_RULE}, got {name!r}')
        if name in configs:
            raise UsageError(f'arm {name!r} is given twice')
        if not Path(path).is_file():
            raise UsageError(
                f'arm {name!r}: config {path} does not exist or is not a file'
            )
        try:
            config = Config.fromfile(path)
        except (Exception, SystemExit) as error:  # a config is code
            raise UsageError(
                f'arm {name!r}: config {path}: {one_line(error)}'
            ) from error
        merge_options(config, options or {}, f'arm {name!r}: --cfg-options')
        pairs = dict(_override(name, word) for word in own)
        merge_options(config, pairs, f'arm {name!r}:')
        try:
            settle_own_sections(config)
            check_model(config, path)
        except UsageError as error:
            raise UsageError(f'arm {name!r}: {error}') from error
        configs[name] = config
    first, *others = configs
    of_first = _budget(configs[first], tuned)
    for other in others:
        for part, section in _budget(configs[other], tuned).items():
            if section != of_first[part]:
                raise UsageError(
                    f'arms {first!r} and {other!r} differ in {part}; a '
                    'comparison is fair on one budget only, or where --tune '
                    'chooses what differs for each arm'
                )
    return configs


def budget(configs: dict[str, Config], tuned: str = '') -> dict:
    """The parts of their configs in which all arms agree, as plain values."""
    config = next(iter(configs.values()))
    return with_names(_budget(config, tuned))


def _budget(config: Config, tuned: str) -> dict:
    """The budget, without a tuned value and the precision of arithmetic."""
    parts = {part: copy.deepcopy(config.get(part)) for part in EQUAL}
    wrapper = parts['optim_wrapper']
    if wrapper is not None:
        parts['optim_wrapper'] = {
            k: v for k, v in wrapper.items() if k not in PRECISION
        }
    outer, _, last = tuned.rpartition('.')
    section = dict(walk(parts)).get(outer)
    if isinstance(section, dict):
        section.pop(last, None)
    return parts


def _override(arm: str, text: str) -> tuple[str, object]:
    key, equals, value = text.partition('=')
    if not equals:
        raise UsageError(f'arm {arm!r}: expected KEY=VALUE, got {text!r}')
    try:
        return key, json.loads(value)
    except ValueError:
        return key, None if value == 'None' else value


def teachers(configs: dict[str, Config]) -> dict[str, str]:
    """The checkpoints that the guidance of the arms names, by their place."""
    return {
        f'arm {arm!r}: {path}': value
        for arm, config in configs.items()
        for path, value in walk(
            {'guidance': config.model.get('guidance')}, 'model'
        )
        if value and path.endswith('.checkpoint')
    }


def check_arms(configs: dict[str, Config]) -> None:
    """Build the model of every arm, before any of them trains for hours.

    Raises:
        UsageError: If one cannot be built.
    """
    for arm, config in configs.items():
        try:
            build_model(config)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise UsageError(f'arm {arm!r}: {one_line(error)}') from error


def build_model(config: Config) -> nn.Module:
    """The model of a complete recipe, as the runner builds it."""
    compat.enable()
    init_default_scope(config.get('default_scope', 'mmpretrain'))
    config = copy.deepcopy(config)
    set_image_shape(config)
    if config.get('data_preprocessor') is not None:
        config.model.setdefault('data_preprocessor', config.data_preprocessor)
    return MODELS.build(config.model)
