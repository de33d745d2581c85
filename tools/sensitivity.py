"""Which layers need which bits: tools/sensitivity.py CONFIG CHECKPOINT."""

from mmauxq.cli import run
from mmauxq.cli.run_command import exit_process

if __name__ == '__main__':
    exit_process(run('sensitivity'))
