"""Arms by seeds: their training, their records and their table.

A comparison lives in one folder::

    comparison.json     what holds for all runs, and the config of each arm
    tune/               runs with other values of a setting
    runs/ARM/SEED/      recipe.py, checkpoints, log.txt, and result.json or
                        diverged
    results.jsonl       one line for each finished run
    table.md            means, spread, paired differences
    *.png               figures

A run is finished when its ``result.json`` is there and in order, or when its
numbers were no longer finite; a killed comparison goes on from there. Each
file is complete, or as it was.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config

from mmauxq import text
from mmauxq.errors import TrainingError, UsageError, check_choice, shorten
from mmauxq.files import write_atomically
from mmauxq.stopping import Stopped

from . import records as checked
from .placement import Placement, Run
from .statistics import paired_difference, spread

OPTIONS = {
    'start': '--float',
    'options': '--cfg-options',
    'metric': '--metric',
    'tuning': '--tune',
}
"""Field of ``comparison.json`` -> what sets it, where that has another name.
"""
DIVERGED = ('NaN or infinity, first in', 'holds NaN or infinity;')
"""Of the errors with which a run ends whose numbers are not finite: in a step,
and in what a checkpoint would have held."""


def begin(out: Path, **terms: Any) -> None:
    """Write what holds for all runs of a folder, before the first of them.

    Args:
        out: Folder of the comparison.
        terms: Field of ``comparison.json`` -> value.

    Raises:
        UsageError: If the folder holds arms that began on other terms, or its
            ``comparison.json`` is damaged.
    """
    before = describe(out)
    terms = json.loads(json.dumps(terms))  # lists for tuples
    for name, value in terms.items():
        # those of early versions say less
        if before['arms'] and before.get(name, value) != value:
            raise UsageError(
                f'{out} was begun with {OPTIONS.get(name, name)} '
                f'{shorten(before[name])}, got {shorten(value)}; choose '
                'another folder'
            )
    _write_description(out, dict(commit=checked.commit()) | before | terms)


def plan(
    out: Path,
    configs: dict[str, Config],
    seeds: Sequence[int],
    **found: dict,
) -> list[Run]:
    """Write the folder of a comparison; keep what is finished there.

    Args:
        out: The folder.
        configs: Of each arm.
        seeds: Of each arm.
        found: Field of ``comparison.json`` -> what was found of each arm
            before; that of other arms stays.

    Raises:
        UsageError: If the folder holds an arm of that name that differs, or
            its ``comparison.json`` is damaged.
    """
    arms = {name: config.pretty_text for name, config in configs.items()}
    before = describe(out)
    for name in arms.keys() & before['arms'].keys():
        if arms[name] != before['arms'][name]:
            raise UsageError(
                f'{out} holds an arm {name!r} with another config; choose '
                'another folder, or another name'
            )
    runs = [
        Run(name, seed, out / 'runs' / name / str(seed))
        for seed in seeds
        for name in configs
    ]
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(run.folder / 'recipe.py', arms[run.arm].encode())
    for field, of_arms in dict(arms=arms, **found).items():
        before[field] = before.get(field, {}) | of_arms
    _write_description(out, before)
    return runs


def describe(out: Path) -> dict[str, Any]:
    """The content of a folder's ``comparison.json``; without one, no arms.

    Raises:
        UsageError: If it is damaged.
    """
    file = out / 'comparison.json'
    if not file.is_file():
        return dict(arms={})
    helps = 'without it, the same command goes on with the finished runs'
    try:
        content = checked.read_json(file)
    except UsageError as error:
        raise UsageError(f'{error}; {helps}') from error
    arms = content.get('arms') if isinstance(content, dict) else None
    if not isinstance(arms, dict) or not all(
        checked.is_arm(name) and isinstance(config, str)
        for name, config in arms.items()
    ):
        raise UsageError(
            f'{file}: expected `arms`, the config of each by its name, '
            f'got {shorten(content, 60)}; {helps}'
        )
    tuning = {k: content.get(k) for k in ('tuning', 'held_out', 'chosen')}
    if not checked.is_tuning(**tuning):
        raise UsageError(
            f'{file}: expected `tuning`, and by arm `held_out`, the metric of '
            f'each value, and `chosen`, got {shorten(tuning, 60)}; {helps}'
        )
    seeds = content.get('diverged', {})
    if not checked.is_diverged(seeds):
        raise UsageError(
            f'{file}: expected `diverged`, the seeds of each arm, got '
            f'{shorten(seeds, 60)}; {helps}'
        )
    return dict(tuning=None) | content


def _write_description(out: Path, content: dict) -> None:
    text = json.dumps(content, indent=1)
    write_atomically(out / 'comparison.json', text.encode())


def train(
    runs: Sequence[Run],
    jobs: int,
    start: str | None = None,
    gpus: Sequence[str] = (),
    metric: str = checked.TOP1,
    may_diverge: bool = False,
) -> Iterator[dict[Run, str]]:
    """Train the runs that are not finished, each in its own process.

    A run whose ``result.json`` is damaged is trained again, with a warning.
    A run joins others on a GPU only where its memory is free: what the same
    arm held with another seed, else what any run did. One that runs out of
    memory beside others is tried again alone, once.

    Args:
        runs: Result of :func:`plan`.
        jobs: Processes at a time, on each GPU.
        start: A float checkpoint that all quantized arms start from; may
            hold ``{seed}``.
        gpus: Result of :func:`mmauxq.compare.placement.find_gpus`; none for
            the CPU.
        metric: What the validation gives in percent, the more the better.
        may_diverge: Whether a run whose numbers are no longer finite is
            marked as such, and the others go on.

    Yields:
        The runs under way and where they are, such as ``gpu 0`` (empty on the
        CPU), twice a second; at last none.

    Raises:
        UsageError: If a run fails; the others are stopped.
        TrainingError: If it fails for a full disk or the like.
        Stopped: On SIGINT and SIGTERM, after the runs are stopped.
    """
    waiting = [run for run in runs if not _is_finished(run)]
    active: dict[Run, subprocess.Popen] = {}
    places = Placement(runs, gpus, jobs)
    try:
        with _signals() as signals:
            while waiting or active:
                while waiting and (gpu := places.add(waiting[0])) is not None:
                    run = waiting.pop(0)
                    active[run] = _begin(run, start, gpu, metric)
                time.sleep(0.5)
                if signals:
                    raise Stopped(signals[0])
                for run, process in list(active.items()):
                    if process.poll() is not None:
                        del active[run]
                        places.remove(run)
                        if _needs_a_gpu_alone(run):
                            places.alone.add(run)
                            waiting.append(run)
                        else:
                            _check_finished(run, may_diverge)
                yield {run: places.where(run) for run in active}
    finally:
        for process in active.values():
            process.terminate()
        for process in active.values():
            process.wait()


def _is_finished(run: Run) -> bool:
    if run.diverged.exists():
        return True
    if not run.result.is_file():
        return False
    try:
        checked.read_result(run.result)
    except UsageError as error:
        print(f'warning: {error}; trained again', file=sys.stderr)
        run.result.unlink()
        return False
    return True


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list to which SIGINT and SIGTERM are added when they come.

    A library or a destructor could swallow an exception that is raised there.
    """
    signals: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(k, lambda k, _: signals.append(k)) for k in kinds]
    try:
        yield signals
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def _needs_a_gpu_alone(run: Run) -> bool:
    """Whether a run failed for lack of memory, beside others."""
    if run.result.is_file() or not run.shared.exists():
        return False
    end = '\n'.join(_log(run)[-20:])
    return 'out of memory' in end or 'STATUS_ALLOC_FAILED' in end


def _check_finished(run: Run, may_diverge: bool) -> None:
    if not run.result.is_file():
        failed = f'arm {run.arm!r}, seed {run.seed} failed'
        see = f'(see {run.folder / "log.txt"})'
        line = ''.join(c for c in _log(run)[-1] if c.isprintable())
        if may_diverge and any(ending in line for ending in DIVERGED):
            run.diverged.touch()
            return
        kind = TrainingError if 'TrainingError: ' in line else UsageError
        raise kind(f'{failed}: {line} {see}')


def _log(run: Run) -> list[str]:
    log = (run.folder / 'log.txt').read_text(errors='replace')
    return (log.strip() or '?').splitlines()


def _begin(
    run: Run, start: str | None, gpu: str, metric: str
) -> subprocess.Popen:
    words = [sys.executable, '-m', 'mmauxq.compare.training_run']
    words += [str(run.folder), str(run.seed), metric]
    if start is not None:
        words.append(start.replace('{seed}', str(run.seed)))
    env = dict(os.environ, CUDA_VISIBLE_DEVICES=gpu)
    with open(run.folder / 'log.txt', 'a') as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env=env)


def note_diverged(out: Path) -> None:
    """Write into ``comparison.json`` which arms diverged with which seeds."""
    seeds: dict[str, list[int]] = {}
    for file in out.glob('runs/*/*/diverged'):
        seeds.setdefault(file.parts[-3], []).append(int(file.parts[-2]))
    before = describe(out)
    if seeds or 'diverged' in before:
        _write_description(out, before | dict(diverged=seeds))


def diverged(description: Mapping) -> str:
    """A line for each arm of which runs are missing, as they diverged.

    Args:
        description: Result of :func:`describe`.
    """
    lines = []
    for arm, found in description.get('diverged', {}).items():
        seeds = f'seed{"s" * (len(found) > 1)} '
        seeds += ', '.join(map(str, sorted(found)))
        lines.append(
            f'warning: arm {arm!r} ended in NaN or infinity with {seeds}; '
            'the table is of the others\n'
        )
    return ''.join(lines)


def collect(out: Path) -> list[dict]:
    """All finished runs of a folder, also written to ``results.jsonl``.

    Arms come in the order of ``comparison.json``, then seeds. A folder that
    holds only its ``results.jsonl`` is read as it is.

    Raises:
        UsageError: If there is none, or a file is damaged.
    """
    order = {arm: place for place, arm in enumerate(describe(out)['arms'])}
    files = out.glob('runs/*/*/result.json')
    try:
        records = [checked.read_result(file) for file in files]
    except UsageError as error:
        raise UsageError(f'{error}; --arms with its arm repairs it') from error
    records.sort(key=lambda run: (order.get(run['arm'], -1), run['seed']))
    results = out / 'results.jsonl'
    if not records and results.is_file():
        return _together(checked.read_lines(results), results)
    lines = [json.dumps(record) + '\n' for record in _together(records, out)]
    write_atomically(results, ''.join(lines).encode())
    return records


def _together(records: list[dict], place: Path) -> list[dict]:
    if not records:
        raise UsageError(f'{place} holds no finished run')
    checked.check_together(records, place)
    return records


def by_arm(records: Sequence[dict]) -> dict[str, dict[int, dict]]:
    """Arm -> seed -> record of that run."""
    arms: dict[str, dict[int, dict]] = {}
    for record in records:
        arms.setdefault(record['arm'], {})[record['seed']] = record
    return arms


def steps_count(records: Sequence[dict]) -> bool:
    """Whether the times of steps can be compared.

    They can if no two runs were on one device at the same time, and all were
    on GPUs of one name, or all on the CPU, and each was timed.
    """
    shared = any(record.get('shared') for record in records)
    timed = all(record['step_seconds'] for record in records)
    return timed and not shared and len({r.get('gpu') for r in records}) == 1


def table(records: Sequence[dict], reference: str) -> str:
    """Means, spread and differences to the arm ``reference``, as Markdown.

    The column of step times is empty unless :func:`steps_count`.

    Raises:
        UsageError: If there is no such arm.
    """
    arms = by_arm(records)
    check_choice('--reference', reference, arms)
    base, metric = arms[reference], checked.metric(records)
    # (C, H, W) of the images for which multiply-adds are counted
    shapes = sorted({tuple(r['cost']['shape']) for r in records if r['cost']})
    work = 'multiply-adds' + ''.join(f' at {shape}' for shape in shapes)
    head = [
        *('arm', 'seeds', f'final {metric}', f'best {metric}'),
        *(f'final - {reference}, 95% interval, wins', 'step'),
        *(f'guidance: parameters, {work}', 'peak memory'),
    ]
    rows = []
    timed = steps_count(records)
    for name, runs in arms.items():
        shared = [seed for seed in runs if seed in base]
        difference: object = ''
        if name != reference and shared:
            pairs = by_seed('final', shared, runs, base)
            difference = paired_difference(*pairs)
        every = list(runs.values())
        step = 1e3 * np.median([run['step_seconds'] for run in every])
        memory = max(run.get('peak_memory', 0) for run in every) / 2**20
        cells = [
            name,
            len(runs),
            spread([run['final'] for run in every]),
            spread([run['best'] for run in every]),
            difference,
            f'{step:.1f} ms' if timed else '',
            _guidance(every[0]['cost']),
            f'{memory:.0f} MiB' if memory else '',
        ]
        rows.append(cells)
    return text.table(head, rows)


def by_seed(
    key: str, seeds: Sequence[int], *arms: dict[int, dict]
) -> list[tuple[float, ...]]:
    """One number of the records of each arm, in the order of the seeds."""
    return [tuple(runs[seed][key] for seed in seeds) for runs in arms]


def _guidance(cost: dict) -> str:
    """Parameters and multiply-adds of the guidance, relative to F."""
    parts = ('parameters', 'multiply_adds') if cost else ()
    return ', '.join(f'+{cost[f"guidance_{p}"] / cost[p]:.1%}' for p in parts)
