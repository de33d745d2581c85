"""Work on several ranks: gloo on the CPU, NCCL where there are GPUs."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mmauxq.accelerate import release_recordings


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def run_rank(
    queue: Any, count: int, port: int, cuda: bool, rank: int,
    work: Callable, args: tuple,
) -> None:  # fmt: skip
    """A process of :func:`on_ranks`."""
    names = ('RANK', 'LOCAL_RANK')
    os.environ.update(dict.fromkeys(names, str(rank)))
    os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
    torch.set_num_threads(1)
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        'nccl' if cuda else 'gloo',
        init_method=f'tcp://127.0.0.1:{port}',
        rank=rank,
        world_size=count,
    )
    try:
        result = work(rank, *args)
    except Exception as error:
        result = error
    queue.put((rank, result))
    if not isinstance(result, Exception):
        dist.barrier()
        release_recordings()
        dist.destroy_process_group()


def on_ranks(
    count: int, work: Callable, *args: Any, cuda: bool = False, patience=1200
) -> list[Any]:
    """What ``work(rank, *args)`` returns on each rank.

    Args:
        count: Of ranks.
        work: On GPUs a function that can be imported, since CUDA does not
            live through a fork. Returns what can be sent: no tensors.
        *args: Of ``work``.
        cuda: GPUs and NCCL.
        patience: Seconds.
    """
    context = multiprocessing.get_context('spawn' if cuda else 'fork')
    queue, port = context.Queue(), free_port()
    ranks = [
        context.Process(
            target=run_rank,
            args=(queue, count, port, cuda, rank, work, args),
            daemon=True,
        )
        for rank in range(count)
    ]
    for process in ranks:
        process.start()
    results = dict(queue.get(timeout=patience) for _ in ranks)
    for process in ranks:
        process.join(patience)
        assert process.exitcode == 0
    return [results[rank] for rank in range(count)]
