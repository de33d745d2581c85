"""Export a trained network: tools/export.py CONFIG CHECKPOINT --out DIR."""

import sys

import mmauxq  # noqa: F401  (makes mmauxq:: bases known to the config)
from mmauxq.export.command import export_command

if __name__ == '__main__':
    sys.exit(export_command())
