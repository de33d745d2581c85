"""Which process of a distributed job this is."""

import os

NAMES = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')


def rank() -> int:
    """Of this process, 0 outside of a distributed job."""
    for name in NAMES:
        if os.environ.get(name, '').isdigit():
            return int(os.environ[name])
    return 0


def is_distributed() -> bool:
    """Whether a launcher started this process, as one of several or alone."""
    return any(os.environ.get(name, '').isdigit() for name in NAMES)
