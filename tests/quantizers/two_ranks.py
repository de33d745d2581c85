"""Calibrate on two gloo processes, each with half of the data.

    python two_ranks.py DATA OUT

Rank i writes the state of every quantizer to OUT/i.pt. Not a test itself: see
test_over_ranks.py.
"""

import sys
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing as mp
from torch import nn

from mmauxq.quantizers import LSQ, LSQPlus, PACTActivation, calibrate


def make_quantizers() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            'lsq': LSQ(2),
            'lsq_channels': LSQ(2, num_channels=3, channel_axis=1),
            'lsq_plus': LSQPlus(2),
            'lsq_plus_channels': LSQPlus(2, num_channels=3, channel_axis=1),
            'pact': PACTActivation(2),
        }
    )


def calibrate_all(model: nn.ModuleDict, x: torch.Tensor) -> None:
    calibrate(model, lambda: [quantizer(x) for quantizer in model.values()])


def work(rank: int, data: Path, out: Path) -> None:
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{out / "meet"}', rank=rank, world_size=2
    )
    model = make_quantizers()
    halves = torch.load(data, weights_only=True).chunk(2)
    calibrate_all(model, halves[rank])
    torch.save(model.state_dict(), out / f'{rank}.pt')
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    mp.spawn(work, tuple(map(Path, sys.argv[1:])), nprocs=2)
