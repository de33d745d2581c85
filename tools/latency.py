"""Speed of the exported forms: tools/latency.py CONFIG [--batch 1 32]."""

import sys

import mmauxq  # noqa: F401  (makes mmauxq:: bases known to the config)
from mmauxq.export.latency_command import latency_command

if __name__ == '__main__':
    sys.exit(latency_command())
