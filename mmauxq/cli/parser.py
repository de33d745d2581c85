"""The arguments that commands share."""

import argparse
import json
import re
from collections.abc import Callable
from typing import NoReturn

from mmauxq.errors import UsageError

_A_DICT = re.compile(r'[^=]+=[\s\[(]*(\{|dict\()')
"""A KEY=VALUE whose value is a dict, or a list of them."""


class Parser(argparse.ArgumentParser):
    """Raises :class:`UsageError` where argparse would leave the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f'{message} (see {self.prog} --help)')


class _KeyValues(argparse.Action):
    """MMEngine's ``DictAction``, and dicts as JSON, which that one would
    split at their commas."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        words: list[str],
        option: str | None = None,
    ) -> None:
        from mmengine.config import DictAction

        dicts = [word for word in words if _A_DICT.match(word)]
        plain = [word for word in words if word not in dicts]
        action = DictAction(self.option_strings, self.dest)
        try:
            action(parser, namespace, plain, option)
        except Exception as error:  # it raises what its own parts raise
            raise UsageError(
                '--cfg-options: expected KEY=VALUE pairs such as '
                f'train_cfg.max_epochs=10, got {words!r} ({error})'
            ) from error
        for word in dicts:
            key, _, value = word.partition('=')
            try:
                getattr(namespace, self.dest)[key] = json.loads(value)
            except ValueError as error:
                raise UsageError(
                    f'--cfg-options {key}: expected a dict as JSON, such as '
                    f'{key}={{"NAME": 1}}, or a value of it, such as '
                    f'{key}.NAME=1, got {value!r} ({error})'
                ) from error


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """``CONFIG`` and ``--cfg-options``."""
    parser.add_argument('config', help='config file')
    add_cfg_options(parser)


def add_network_arguments(
    parser: argparse.ArgumentParser, images: int, what: str
) -> None:
    """``CONFIG``, ``CHECKPOINT`` and ``--images``.

    Args:
        parser: Of the command.
        images: Default of ``--images``.
        what: What they are for, in the help.
    """
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='training checkpoint or slim one')
    parser.add_argument(
        '--images',
        type=integer(0),
        default=images,
        metavar='N',
        help=f'{what} (default: {images}); 0 for a few generated ones',
    )


def add_cfg_options(
    parser: argparse.ArgumentParser,
    help: str = 'override settings of the config, such as '
    'model.guidance.loss_weight=0.3 or data.key="[a,b]"',
) -> None:
    """``--cfg-options KEY=VALUE ...``."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_KeyValues,
        metavar='KEY=VALUE',
        help=help,
    )


def add_runner_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the commands that start MMEngine's runner."""
    parser.add_argument(
        '--work-dir',
        help='where logs and checkpoints go (default: '
        './work_dirs/NAME-OF-CONFIG)',
    )
    parser.add_argument(
        '--launcher',
        default='none',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        help='job launcher',
    )
    # torch.distributed.launch writes one or the other
    names = '--local_rank', '--local-rank'
    parser.add_argument(*names, type=int, default=0, help=argparse.SUPPRESS)


def integer(least: int = 0) -> Callable[[str], int]:
    """For argparse's ``type``: an integer from ``least`` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f'expected an integer from {least}, got {text!r}'
            )
        return int(text)

    return parse
