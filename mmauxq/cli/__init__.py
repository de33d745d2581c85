"""The command ``mmauxq`` and its sub-commands.

A command is a module of this package with two functions:
``add_arguments(parser)``, and ``run(args, mark_running)``, which does the work
and calls ``mark_running()`` where the set-up ends (see :mod:`.run_command`).
It imports torch and the OpenMMLab packages inside of ``run``, so that
``--help`` answers at once.
"""

import importlib
import sys
from collections.abc import Sequence

from mmauxq.version import __version__

COMMANDS = {
    'train': 'train a network as a config says',
    'test': 'evaluate the low-precision network alone',
    'export': 'write the files that are deployed, and check them',
    'audit': 'count the levels of every quantized tensor',
    'latency': 'measure the speed of the exported forms',
    'sensitivity': 'measure which layers need which bits, and propose them',
    'compare': 'train several recipes by several seeds, and compare them',
}

USAGE = """usage: mmauxq COMMAND ...

Train 2- to 4-bit image classifiers with a full-precision auxiliary module.

{}

mmauxq COMMAND --help lists the arguments of a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """``mmauxq COMMAND ...``; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name, *rest = argv or ['--help']
    if name in COMMANDS:
        return run(name, rest, f'mmauxq {name}')
    if name in ('-h', '--help'):
        rows = [f'  {name:11} {text}' for name, text in COMMANDS.items()]
        print(USAGE.format('\n'.join(rows)))
        return 0
    if name == '--version':
        print(f'mmauxq {__version__}')
        return 0
    expected = f'expected one of {", ".join(COMMANDS)}, got {name!r}'
    print(f'error: {expected} (see mmauxq --help)', file=sys.stderr)
    return 2


def run(
    name: str, argv: Sequence[str] | None = None, prog: str | None = None
) -> int:
    """Run a key of :data:`COMMANDS` as :func:`.run_command.run_command`."""
    from .run_command import run_command

    # the current folder has the user's own modules, which custom_imports of a
    # config names; at the end, so that no file in it hides a package
    if '' not in sys.path:
        sys.path.append('')
    command = importlib.import_module(f'{__name__}.{name}')
    return run_command(command, argv, prog)
