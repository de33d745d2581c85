"""Evaluate the low-precision network: tools/test.py CONFIG CHECKPOINT."""

import mmauxq  # noqa: F401  (makes mmauxq:: bases known to the config)
from mmauxq.engine.command_line import leave
from mmauxq.engine.launch import test

if __name__ == '__main__':
    leave(test())
