"""Evaluate the low-precision network: tools/test.py CONFIG CHECKPOINT."""

import sys

import mmauxq  # noqa: F401  (makes mmauxq:: bases known to the config)
from mmauxq.engine.launch import test

if __name__ == '__main__':
    sys.exit(test())
