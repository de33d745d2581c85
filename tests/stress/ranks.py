"""Train a small network on many ranks: equal to each other, and to one.

    python -m tests.stress.ranks --ranks 8 --steps 100 [--cuda-graph]

On as many GPUs, through NCCL and with SyncBN, else on the CPU through gloo.
There batch norm has statistics of each rank's own, which SyncBuffersHook
averages before validation and at the end of an epoch.

Ranks that begin with unequal weights must end with parameters, steps and
scales after calibration that are equal to the bit, and so must all buffers
after that average (before it, too, with SyncBN). The mean of the ranks' losses
must be the loss of one process with the whole batch, in float32: within 1e-4
of it with quantizers of 32 bits, which do nothing. At 8 bits sums in another
order move values to the next level, and the runs part slowly: within 1e-3 in
the first five steps, within 1e-2 in all.
One process parts as far from itself where the images of a batch only come in
another order. How far is chance, so several orders are tried, and in all steps
twice the furthest is allowed as well.
Without GPUs these two use stored batch-norm statistics.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import all_reduce_params
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, convert_sync_batchnorm
from mmengine.optim import OptimWrapper

from mmauxq.quantizers import named_quantizers
from tests.networks import AUX, batch, classifier, joint_qat
from tests.support.ranks import on_ranks

IMAGES = 4
"""Of each rank in a step."""

RATE = 0.05
"""Four times that, and with stored statistics of batch norm one process parts
from itself where its images come in another order, at 32 bits, too."""

BITS = dict(float=32, whole=8)
EARLY_STEPS = 5
ORDERS = 8
"""Other orders of the images of a batch."""
TOLERANCE = dict(float=(1e-4, 1e-4), whole=(1e-3, 1e-2))
"""Of the loss, relative: in the first steps, and in all."""


def settings(what: str, cuda: bool) -> dict:
    """Arguments of the model of a part of the test."""
    if what == 'equal':
        return dict(guidance=AUX)
    return dict(
        architecture=classifier(norm_eval=not cuda),
        guidance=dict(type='mmauxq.IntermediateClassifiers'),
        quantizers=dict(
            weight=dict(type='mmauxq.LSQ', bits=BITS[what]),
            activation=dict(type='mmauxq.LSQ', bits=BITS[what]),
        ),
    )


def numbers(tensors) -> dict[str, np.ndarray]:
    """Copies, on the CPU."""
    return {name: t.detach().cpu().numpy().copy() for name, t in tensors}


def train(
    rank: int, ranks: int, what: str, steps: int, cuda: bool, recorded: bool,
    order: int = 0,
) -> dict:  # fmt: skip
    """What one rank has after some steps.

    Args:
        rank: -1 for one process alone, with the whole batch.
        ranks: Their number.
        what: A part of the test.
        steps: Number of steps.
        cuda: GPUs, with NCCL and SyncBN.
        recorded: Whether steps are recorded as CUDA graphs.
        order: Number of the order of the images of a batch; 0 leaves it.
    """
    MMLogger.get_current_instance().setLevel('ERROR')
    if cuda:
        torch.backends.cudnn.allow_tf32 = False
    seed = rank if what == 'equal' else 0
    model = joint_qat(seed=seed, cuda_graph=recorded, **settings(what, cuda))
    wrapped, part = model, list(range(IMAGES * ranks))
    if order:
        random.Random(order).shuffle(part)
    if cuda:
        model.cuda()
    if rank >= 0:
        part = part[IMAGES * rank : IMAGES * (rank + 1)]
        if cuda:
            wrapped = model = convert_sync_batchnorm(model)
        wrapped = MMDistributedDataParallel(
            model,
            device_ids=[rank] if cuda else None,
            broadcast_buffers=False,
        )
    model.train()  # norm_eval takes effect here
    optim = OptimWrapper(torch.optim.SGD(model.parameters(), RATE))
    found: dict = dict(losses=[])
    for step in range(steps):
        inputs, samples = batch(IMAGES * ranks, seed=step % 4)
        logs = wrapped.train_step(
            dict(
                inputs=[inputs[i] for i in part],
                data_samples=[samples[i] for i in part],
            ),
            optim,
        )
        found['losses'].append(float(logs['loss'].detach()))
        if not step:
            found['calibrated'] = numbers(
                (n, q.step) for n, q in named_quantizers(model)
            )
    found['parameters'] = numbers(model.named_parameters())
    found['buffers before'] = numbers(model.named_buffers())
    if rank >= 0:  # as SyncBuffersHook
        all_reduce_params(model.buffers(), op='mean')
    found['buffers'] = numbers(model.named_buffers())
    return found


def differing(results: list[dict], key: str) -> list[str]:
    """Names of what is not equal to the bit on all ranks."""
    first, *others = (result[key] for result in results)
    return [
        name
        for name, value in first.items()
        if any(o[name].tobytes() != value.tobytes() for o in others)
    ]


def check_equal(
    what: str, ranks: int, steps: int, cuda: bool, recorded: bool
) -> tuple[dict, bool]:
    """(what was found, whether it is good)."""
    results = on_ranks(
        ranks, train, ranks, what, steps, cuda, recorded, cuda=cuda
    )
    for result in results:
        if isinstance(result, Exception):
            raise result
    keys = ('calibrated', 'parameters', 'buffers before', 'buffers')
    line: dict = dict(
        part=what, ranks=ranks, steps=steps, nccl=cuda, recorded=recorded
    )
    line |= {
        key: [len(differing(results, key)), len(results[0][key])]
        for key in keys
    }
    own = [
        name
        for name in differing(results, 'buffers before')
        if not name.endswith(('running_mean', 'running_var')) or cuda
    ]
    good = not own and not any(
        line[key][0] for key in keys if key != 'buffers before'
    )
    return line, good


def check_whole(
    what: str, ranks: int, steps: int, cuda: bool, recorded: bool
) -> tuple[dict, bool]:
    """(what was found, whether it is good)."""
    results = on_ranks(
        ranks, train, ranks, what, steps, cuda, recorded, cuda=cuda
    )
    for result in results:
        if isinstance(result, Exception):
            raise result
    whole, *others = (
        np.array(train(-1, ranks, what, steps, cuda, recorded, i)['losses'])
        for i in range(ORDERS + 1)
    )
    parts = np.mean([result['losses'] for result in results], axis=0)
    apart = np.abs(parts - whole) / whole
    alone = [float((np.abs(other - whole) / whole).max()) for other in others]
    line = dict(
        part=what, ranks=ranks, steps=steps, nccl=cuda, recorded=recorded,
        first_loss=float(whole[0]), last_loss=float(whole[-1]),
        early=float(apart[:EARLY_STEPS].max()), late=float(apart.max()),
        other_order=max(alone), orders=alone,
    )  # fmt: skip
    early, late = TOLERANCE[what]
    late = max(late, 2 * line['other_order'])
    return line, line['early'] <= early and line['late'] <= late


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--ranks', type=int, default=8)
    parser.add_argument('--steps', type=int, default=100)
    parser.add_argument('--out', type=Path, help='add lines to this file')
    parser.add_argument(
        '--cuda-graph', action='store_true', help='record the steps'
    )
    args = parser.parse_args()
    cuda = torch.cuda.device_count() >= args.ranks
    good = True
    for what in ('equal', 'float', 'whole'):
        check = check_equal if what == 'equal' else check_whole
        begin = time.monotonic()
        line, fine = check(what, args.ranks, args.steps, cuda, args.cuda_graph)
        line['seconds'] = round(time.monotonic() - begin, 1)
        line['good'] = fine
        print(line, flush=True)
        if args.out:
            with args.out.open('a') as file:
                file.write(json.dumps(line) + '\n')
        good = good and fine
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
