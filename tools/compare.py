"""Compare recipes: tools/compare.py --arms NAME=CONFIG ... --out DIR."""

from mmauxq.cli import run
from mmauxq.cli.run_command import exit_process

if __name__ == '__main__':
    exit_process(run('compare'))
