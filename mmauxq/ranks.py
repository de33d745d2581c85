"""Which process of a distributed job this is."""

import os


def rank() -> int:
    """Of this process, 0 outside of a distributed job."""
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        if os.environ.get(name, '').isdigit():
            return int(os.environ[name])
    return 0
