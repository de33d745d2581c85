"""``python -m mmauxq`` is the command ``mmauxq``."""

from typing import NoReturn

from mmauxq.cli import main
from mmauxq.cli.run_command import exit_process


def command() -> NoReturn:
    """What the installed command calls."""
    exit_process(main())


if __name__ == '__main__':
    command()
