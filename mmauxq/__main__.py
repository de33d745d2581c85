"""``python -m mmauxq`` is the command ``mmauxq``."""

from mmauxq.cli import main
from mmauxq.cli.run_command import exit_process

if __name__ == '__main__':
    exit_process(main())
