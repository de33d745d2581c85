"""One measurement in this process; see :mod:`.processes`."""

import argparse
import os
import time
from pathlib import Path

import torch

from . import loader, ops, results, runner, steps
from .processes import Turn


def measure(
    name: str, out: Path, repeats: int, batch: int | None, size: int
) -> list[dict]:
    """The rows of one measurement.

    Args:
        name: As of :func:`.names.chosen`, without ``scaling/*``.
        out: Folder for files that are needed meanwhile.
        repeats: Number of timed calls.
        batch: Instead of the batch size in the name.
        size: Height and width of the images in pixels.
    """
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    turn = Turn(out / 'turn.lock')
    kind, *parts = name.split('/')
    if kind == 'ops' and parts[0] == 'activations':
        turn.take()
        return list(ops.activations(device, repeats, device == 'cpu'))
    if kind == 'ops':
        layers = steps.weights_of(parts[1], size, turn)
        turn.take()
        return list(ops.weights(layers, torch.bfloat16, device, repeats))
    if kind == 'loader':
        network, workers = parts
        cores = len(os.sched_getaffinity(0))
        count = cores if workers == 'all' else int(workers)
        turn.take()
        return [loader.measure(network, count, out / 'images', repeats)]
    network, what, form, standard = parts
    batch = batch or int(standard)
    if kind == 'step':
        row = steps.measure(network, what, form, batch, size, repeats, turn)
    else:
        folder = out / name.replace('/', '-')
        row = runner.measure(
            network, what, form, batch, size, max(4, repeats), folder, turn
        )
    return [dict(network=network, what=what, form=form, batch=batch, **row)]


def main() -> None:
    """Measure, and append the rows to ``OUT/results.jsonl``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('name')
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--batch', type=int)
    parser.add_argument('--size', type=int, default=224)
    args = parser.parse_args()
    start = time.time()
    rows = measure(args.name, args.out, args.repeats, args.batch, args.size)
    more = dict(
        size=args.size,
        seconds=round(time.time() - start, 1),
        **results.machine(),
    )
    for row in rows:
        results.append(args.out, dict(arm=args.name, **row, **more))


if __name__ == '__main__':
    main()
