"""One measurement, in a process that :mod:`.processes` starts."""

import json
import os
import sys
import time
from pathlib import Path

import torch

from . import epoch, loader, ops, results, runner, steps
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
        network, workers, decoder = [*parts, loader.PLAIN][:3]
        cores = len(os.sched_getaffinity(0))
        count = cores if workers == 'all' else int(workers)
        turn.take()
        folder = out / 'images'
        return [
            loader.measure(network, count, folder, repeats, decoder=decoder)
        ]
    if kind == 'epoch':
        folder = out / name.replace('/', '-')
        row = epoch.measure(parts[0], repeats, folder, turn)
        return [dict(network=parts[0], **row)]
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


def main(name: str, out: str, size: int, **settings: int) -> None:
    """Measure, and append the rows to ``OUT/results.jsonl``."""
    start = time.time()
    rows = measure(name, Path(out), size=size, **settings)
    seconds = round(time.time() - start, 1)
    more = dict(size=size, seconds=seconds, **results.machine())
    for row in rows:
        results.append(Path(out), dict(arm=name, **row, **more))


if __name__ == '__main__':
    main(**json.loads(sys.argv[1]))
