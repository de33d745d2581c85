"""Train a classifier: tools/train.py CONFIG."""

import mmauxq  # noqa: F401  (makes mmauxq:: bases known to the config)
from mmauxq.engine.command_line import leave
from mmauxq.engine.launch import train

if __name__ == '__main__':
    leave(train())
