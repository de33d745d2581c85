"""The config that a command was given."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mmauxq import compat
from mmauxq.errors import UsageError, one_line

if TYPE_CHECKING:
    from mmengine.config import Config


def load_config(
    args: argparse.Namespace, change: Callable[['Config'], None] | None = None
) -> 'Config':
    """Read ``args.config`` and merge ``args.cfg_options`` into it.

    It is also kept as ``args.loaded``, for the message of a later error.

    Args:
        args: Of the command line.
        change: What other options make of the config, before its sections
            are checked.

    Raises:
        UsageError: If the file cannot be read, has no classifier, or an
            option or a section of this package does not fit.
    """
    from mmengine.config import Config

    from mmauxq.engine.config_validation import (
        check_model,
        merge_options,
        settle_own_sections,
    )

    path = args.config
    if not Path(path).is_file():
        raise UsageError(f'config {path} does not exist or is not a file')
    try:
        cfg = Config.fromfile(path)
    except BaseException as error:  # a config is code: it may raise anything
        if compat.needs_pkg_resources(error):
            raise UsageError(
                f'config {path}: bases such as mmpretrain:: need '
                'pkg_resources: pip install "setuptools<82"'
            ) from error
        raise UsageError(f'config {path}: {one_line(error)}') from error
    merge_options(cfg, args.cfg_options or {}, '--cfg-options')
    cfg.launcher = getattr(args, 'launcher', 'none')
    args.loaded = cfg
    if change is not None:
        change(cfg)
    settle_own_sections(cfg)
    check_model(cfg, path)
    return cfg
