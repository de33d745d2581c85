"""Train a classifier: tools/train.py CONFIG."""

import sys

import mmauxq  # noqa: F401  (makes mmauxq:: bases known to the config)
from mmauxq.engine.launch import train

if __name__ == '__main__':
    sys.exit(train())
