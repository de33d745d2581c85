"""Train a classifier: tools/train.py CONFIG."""

import mmauxq  # noqa: F401  (makes mmauxq:: bases known to the config)
from mmauxq.engine.launch import leave, train

if __name__ == '__main__':
    leave(train())
