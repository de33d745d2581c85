"""Evaluate the low-precision network: tools/test.py CONFIG CHECKPOINT."""

import mmauxq  # noqa: F401  (makes mmauxq:: bases known to the config)
from mmauxq.engine.launch import leave, test

if __name__ == '__main__':
    leave(test())
