"""The measurements of speed and memory: which there are, and running them.

Each runs in a process of its own, so that one that fails or is killed leaves
the others alone; rows are written as they come, and a second run does what is
missing.
"""

import argparse
import fnmatch
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mmauxq.errors import UsageError

BATCH, SMALL_BATCH = 256, 32
KINDS = ('ops', 'step', 'runner', 'scaling', 'loader')
PATIENCE = 300
"""Seconds that one measurement may take."""


def _arms() -> Iterator[str]:
    """All names, the most important first: a budget may end early."""
    yield 'ops/activations'
    yield 'ops/weights/r50'
    main = [
        'float/compiled',
        'float/eager',
        'w4a4/compiled',
        'w4a4/eager',
        'w4a4/codes',
        'w4a4/recompute',
        'w4a4/graphed',
        'w4a4/graphed-codes',
        'w4a4/graphed-recompute',
        'aux-amp/graphed',
        'aux-quarter-amp/graphed',
        'kd/graphed',
        'aux-amp/graphed-codes',
        'aux-amp/graphed-recompute',
        'float/graph',
        'aux-amp/compiled',
        'aux-quarter-amp/compiled',
        'kd/compiled',
        'w4a4/compiled-reference',
        'w4a4/compiled-kernel',
        'w4a4/compiled-codes',
        'w4a4/compiled-recompute',
        'aux-amp/compiled-codes',
        'aux-amp/codes',
        'aux-amp/recompute',
        'aux/compiled',
        'aux-quarter/compiled',
        'aux/eager',
        'kd/eager',
        'w4a4/reference',
        'w4a4/graph',
        'w4a4/chained',
        'dsn/compiled',
    ]
    yield from (f'step/r50/{arm}/{BATCH}' for arm in main)
    for arm in (
        'float/graph', 'w4a4/graphed', 'float/eager', 'w4a4/eager',
        'float/compiled-graph', 'w4a4/compiled-graph',
    ):  # fmt: skip
        yield f'step/r50/{arm}/{SMALL_BATCH}'
    yield f'runner/r50/w4a4/plain/{BATCH}'
    for form in ('compiled', 'graphed', 'graphed-codes', 'codes'):
        yield f'runner/r50/w4a4/{form}/{BATCH}'
    yield f'runner/r50/float/compiled-fused/{BATCH}'
    for network in ('deits', 'mbv2', 'r18'):
        for arm in (
            'float/compiled', 'float/eager', 'w4a4/compiled', 'w4a4/eager',
            'w4a4/graphed', 'w4a4/graphed-codes', 'aux-quarter-amp/compiled',
            'aux-amp/compiled',
        ):  # fmt: skip
            yield f'step/{network}/{arm}/{BATCH}'
    for arm in ('r50/aux-amp', 'mbv2/w4a4', 'deits/w4a4'):
        yield f'runner/{arm}/graphed/{BATCH}'
    for arm in (
        'r50/w4a4/plain', 'r50/aux/plain', 'r50/kd/plain', 'r18/aux/plain',
        'r50/w4a4/graphed', 'r50/w4a4/compiled', 'r50/w4a4/syncbn',
    ):  # fmt: skip
        yield f'scaling/{arm}/{BATCH}'
    yield from (f'loader/r18/{workers}' for workers in (1, 2, 'all'))


ARMS = list(_arms())


def chosen(patterns: Sequence[str]) -> list[str]:
    """Names of measurements.

    Args:
        patterns: Names, or shell patterns of the standard ones; those with
            another batch size are made up on the way.

    Raises:
        UsageError: If one means nothing.
    """
    names: list[str] = []
    for pattern in patterns or ['*']:
        found = [name for name in ARMS if fnmatch.fnmatch(name, pattern)]
        if not found and pattern.split('/')[0] in KINDS:
            found = [pattern] if '*' not in pattern else []
        if not found:
            raise UsageError(
                f'--only {pattern}: no measurement; there are '
                f'{", ".join(ARMS[:4])}, ... (see --list)'
            )
        names += [name for name in found if name not in names]
    return names


def done(out: Path) -> set[str]:
    """Measurements of which there is a row that is no error."""
    return {row['arm'] for row in rows(out) if 'error' not in row}


def rows(out: Path) -> list[dict]:
    """What was measured so far."""
    file = out / 'results.jsonl'
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def run_all(
    names: Sequence[str],
    out: Path,
    options: Sequence[str],
    jobs: int,
    minutes: float | None,
) -> list[str]:
    """Run measurements, each in its process; returns those that failed.

    Args:
        names: As of :func:`chosen`.
        out: Folder of ``results.jsonl``.
        options: More arguments of the process.
        jobs: Processes at a time. They take turns on the GPU, and import,
            build and compile meanwhile.
        minutes: After so many none is started, and what runs is ended.
    """
    end = time.monotonic() + (minutes * 60 if minutes else float('inf'))
    out.mkdir(parents=True, exist_ok=True)
    waiting, running, failed = list(names), {}, []
    while waiting or running:
        late = time.monotonic() > end
        if late and waiting:
            print(f'out of time: {len(waiting)} not started', flush=True)
            waiting = []
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running[name] = (_start(name, out, options), time.monotonic())
        for name, (process, start) in list(running.items()):
            too_long = time.monotonic() - start > PATIENCE * jobs
            if process.poll() is None and (late or too_long):
                process.kill()
                process.wait()
            if process.poll() is None:
                continue
            del running[name]
            seconds = time.monotonic() - start
            if process.returncode:
                failed.append(name)
                log = out / 'logs' / f'{name.replace("/", "-")}.txt'
                write_row(out, dict(arm=name, error=_last_line(log)))
            print(
                f'{name}: {"FAILED" if process.returncode else "done"} '
                f'in {seconds:.0f} s',
                flush=True,
            )
        time.sleep(0.1)
    return failed


def _start(name: str, out: Path, options: Sequence[str]) -> subprocess.Popen:
    log = out / 'logs' / f'{name.replace("/", "-")}.txt'
    log.parent.mkdir(exist_ok=True)
    with log.open('w') as stream:
        return subprocess.Popen(
            [sys.executable, '-m', __name__, name, '--out', str(out),
             *options],
            stdout=stream, stderr=subprocess.STDOUT,
            env={**os.environ, 'TORCHINDUCTOR_COMPILE_THREADS': '4'},
        )  # fmt: skip


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    # what a command of ours says comes before the traceback of its caller
    said = [line for line in lines if line.startswith('error: ')]
    return (said or lines or ['killed'])[-1][:400]


def write_row(out: Path, row: dict) -> None:
    """Add to what was measured."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / 'results.jsonl').open('a') as file:
        file.write(json.dumps(row) + '\n')


def machine() -> dict:
    """On what it was measured."""
    return dict(
        device=torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f'CPU, {torch.get_num_threads()} threads',
        torch=torch.__version__,
        python=platform.python_version(),
    )


def measure(
    name: str, out: Path, repeats: int, batch: int | None, size: int
) -> list[dict]:
    """The rows of one measurement.

    Args:
        name: ``'ops/activations'``, ``'ops/weights/NETWORK'``,
            ``'step/NETWORK/WHAT/FORM/BATCH'``,
            ``'runner/NETWORK/WHAT/FORM/BATCH'`` or
            ``'loader/NETWORK/WORKERS'``.
        out: Folder for what is written on the way.
        repeats: Number of timed calls.
        batch: Instead of the batch size in the name.
        size: Height and width of the images.
    """
    from . import benchmark_loader, benchmark_ops, benchmark_steps

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    turn = benchmark_steps.Turn(out / 'turn.lock')
    kind, *parts = name.split('/')
    if kind == 'ops' and parts[0] == 'activations':
        turn.take()
        found = benchmark_ops.activations(device, repeats, device == 'cpu')
        return list(found)
    if kind == 'ops':
        layers = benchmark_steps.weights_of(parts[1], size, turn)
        turn.take()
        return list(
            benchmark_ops.weights(layers, torch.bfloat16, device, repeats)
        )
    if kind == 'loader':
        network, workers = parts
        cores = len(os.sched_getaffinity(0))
        count = cores if workers == 'all' else int(workers)
        turn.take()
        return [
            benchmark_loader.measure(network, count, out / 'images', repeats)
        ]
    network, what, form, standard = parts
    batch = batch or int(standard)
    if kind == 'step':
        row = benchmark_steps.measure(
            network, what, form, batch, size, repeats, turn
        )
    else:
        if form not in benchmark_steps.OPTIONS:
            raise UsageError(
                f'{name}: no form {form}; there are '
                f'{", ".join(benchmark_steps.OPTIONS)}'
            )
        row = benchmark_steps.runner_overhead(
            network, what, benchmark_steps.OPTIONS[form], batch,
            max(4, repeats), size, out / name.replace('/', '-'), turn,
        )  # fmt: skip
    return [dict(network=network, what=what, form=form, batch=batch, **row)]


def main() -> int:
    """One measurement, in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('name')
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--batch', type=int)
    parser.add_argument('--size', type=int, default=224)
    args = parser.parse_args()
    start = time.time()
    found = measure(args.name, args.out, args.repeats, args.batch, args.size)
    for row in found:
        write_row(
            args.out,
            dict(
                arm=args.name,
                **row,
                size=args.size,
                seconds=round(time.time() - start, 1),
                **machine(),
            ),
        )
    return 0


if __name__ == '__main__':
    sys.exit(main())
