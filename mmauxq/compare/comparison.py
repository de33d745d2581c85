"""Arms by seeds, trained on equal terms, and what they say.

A comparison lives in one folder::

    comparison.json     arms, seeds, overrides: what was asked
    runs/ARM/SEED/      config.py, checkpoints, log.txt, result.json
    results.jsonl       one line for each finished run
    table.md            means, spread, paired differences
    *.png               figures

A run is finished when its ``result.json`` exists, so a killed comparison goes
on where it was.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmengine.config import Config

from mmauxq.engine.config_validation import (
    merge_options,
    settle_own_sections,
)
from mmauxq.errors import UsageError
from mmauxq.files import write_atomically

from .statistics import paired_difference, spread

EQUAL = (
    'train_cfg',
    'param_scheduler',
    'optim_wrapper',
    'train_dataloader',
    'val_dataloader',
    'val_evaluator',
)
"""Parts of a config in which all arms must agree: budget and yardstick."""


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    folder: Path

    @property
    def result(self) -> Path:
        """Exists when the run is finished."""
        return self.folder / 'result.json'

    @property
    def progress(self) -> tuple[int, int]:
        """Steps done, and their number (0 before the first step)."""
        try:
            done, of = (self.folder / 'progress').read_text().split()
            return int(done), int(of)
        except (OSError, ValueError):
            return 0, 0


def read_arms(
    arms: Sequence[str], options: dict | None = None
) -> dict[str, Config]:
    """Arms as the command line gives them.

    Args:
        arms: ``NAME=CONFIG``, each followed by any number of
            ``,key=value`` that differ for this arm; values are JSON, or text.
        options: Overrides for all arms.

    Raises:
        UsageError: If a name comes twice, a file is missing, a section does
            not fit, or the arms differ in their budget.
    """
    configs: dict[str, Config] = {}
    for text in arms:
        name, _, rest = text.partition('=')
        # lists and dicts have commas of their own
        path, *own = re.split(r',(?=[A-Za-z_][\w.]*(?:=|$))', rest)
        if not name or not path or '/' in name:
            raise UsageError(f'arm {text!r}; allowed is NAME=CONFIG[,KEY=V]')
        if name in configs:
            raise UsageError(f'arm {name!r} is given twice')
        if not Path(path).is_file():
            raise UsageError(f'arm {name!r}: config {path} does not exist')
        config = Config.fromfile(path)
        merge_options(config, options or {}, f'arm {name!r}: --cfg-options')
        merge_options(
            config, dict(_override(name, o) for o in own), f'arm {name!r}:'
        )
        try:
            settle_own_sections(config)
        except UsageError as error:
            raise UsageError(f'arm {name!r}: {error}') from error
        configs[name] = config
    _check_equal(configs)
    return configs


def _override(arm: str, text: str) -> tuple[str, object]:
    key, found, value = text.partition('=')
    if not found:
        raise UsageError(f'arm {arm!r}: {text!r}; allowed is KEY=VALUE')
    try:
        return key, json.loads(value)
    except ValueError:
        return key, None if value == 'None' else value


def _check_equal(configs: dict[str, Config]) -> None:
    first, *others = configs
    for other in others:
        for part in EQUAL:
            if configs[first].get(part) != configs[other].get(part):
                raise UsageError(
                    f'arms {first!r} and {other!r} differ in {part}; a '
                    'comparison is fair on one budget only'
                )


def check(configs: dict[str, Config]) -> None:
    """Build the model of every arm, and let it go.

    So that a wrong tap or teacher is found before the first run, not after
    hours.

    Raises:
        UsageError: If one cannot be built.
    """
    from mmauxq import compat

    compat.enable()
    from .training_run import build_model

    for arm, config in configs.items():
        try:
            build_model(config)
        except UsageError as error:
            raise UsageError(f'arm {arm!r}: {error}') from error


def plan(
    out: Path, configs: dict[str, Config], seeds: Sequence[int]
) -> list[Run]:
    """Write the folder of a comparison; keep what is finished there.

    Raises:
        UsageError: If the folder holds a comparison of other arms.
    """
    asked = dict(arms={n: c.pretty_text for n, c in configs.items()})
    description = out / 'comparison.json'
    if description.is_file():
        before = json.loads(description.read_text())
        for name, text in before['arms'].items():
            if asked['arms'].get(name, text) != text:
                raise UsageError(
                    f'{out} holds an arm {name!r} with another config; '
                    'choose another folder, or another name'
                )
        asked['arms'] = {**before['arms'], **asked['arms']}
    out.mkdir(parents=True, exist_ok=True)
    description.write_text(json.dumps(asked, indent=1))
    runs = [
        Run(name, seed, out / 'runs' / name / str(seed))
        for seed in seeds
        for name in configs
    ]
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        configs[run.arm].dump(run.folder / 'recipe.py')
    return runs


def train(
    runs: Sequence[Run], jobs: int, start: str | None = None
) -> Iterator[list[Run]]:
    """Train what is not finished, ``jobs`` at a time.

    Args:
        runs: All runs.
        jobs: Processes at a time.
        start: A float checkpoint that all quantized arms start from; may
            hold ``{seed}``.

    Yields:
        The runs under way, twice a second, so that somebody can watch.

    Raises:
        UsageError: If a run fails; the others are stopped, what is finished
            is kept.
        KeyboardInterrupt: On SIGINT and SIGTERM, after the runs are stopped.
    """
    waiting = [run for run in runs if not run.result.is_file()]
    active: dict[Run, subprocess.Popen] = {}
    try:
        with _signals() as signals:
            while waiting or active:
                while waiting and len(active) < jobs:
                    run = waiting.pop(0)
                    active[run] = _begin(run, start)
                time.sleep(0.5)
                if signals:
                    raise KeyboardInterrupt
                yield list(active)
                for run, process in list(active.items()):
                    if process.poll() is not None:
                        del active[run]
                        _check_finished(run)
    finally:
        for process in active.values():
            process.terminate()
        for process in active.values():
            process.wait()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM that come meanwhile.

    Not raised where they come: a library, or a destructor, would swallow
    them, and SIGTERM would leave the runs without anybody who waits for them.
    """
    seen: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(k, lambda k, _: seen.append(k)) for k in kinds]
    try:
        yield seen
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def _check_finished(run: Run) -> None:
    if not run.result.is_file():
        log = run.folder / 'log.txt'
        last = (log.read_text().strip() or '?').splitlines()[-1]
        raise UsageError(
            f'arm {run.arm!r}, seed {run.seed} failed: {last} (see {log})'
        )


def _begin(run: Run, start: str | None) -> subprocess.Popen:
    words = [sys.executable, '-m', 'mmauxq.compare.comparison']
    words += [str(run.folder), str(run.seed)]
    if start is not None:
        words.append(start.format(seed=run.seed))
    with open(run.folder / 'log.txt', 'a') as log:
        return subprocess.Popen(words, stdout=log, stderr=log)


def run_one(folder: Path, seed: int, start: str | None = None) -> None:
    """Train one run in this process and write its ``result.json``."""
    from mmauxq import compat

    compat.enable()
    from .training_run import run_trial

    config = Config.fromfile(folder / 'recipe.py')
    if start is not None and config.model.type == 'mmauxq.JointQAT':
        config.model.float_checkpoint = start
    progress, parent = folder / 'progress', os.getppid()

    def report(done: int, of: int) -> None:
        if os.getppid() != parent:  # killed; the next one trains this run
            raise SystemExit('the comparison that began this run is gone')
        if done % 10 == 0 or done == of:
            progress.write_text(f'{done} {of}')

    trial = run_trial(config, folder, seed, report, resume=True)
    record = dict(
        arm=folder.parent.name,
        seed=seed,
        commit=_commit(),
        start=start,
        final=trial.accuracy[-1],
        best=trial.best,
        accuracy=trial.accuracy,
        seconds=trial.seconds,
        step_seconds=trial.step_seconds,
        peak_memory=trial.peak_memory,
        cost=trial.cost,
        gradients=trial.gradients,
        config=trial.config.pretty_text,
    )
    # a name that does not depend on the number of epochs
    last = folder / 'last.pth'
    if last.is_symlink():
        last.unlink()
    last.symlink_to(trial.last_checkpoint.name)
    write_atomically(folder / 'result.json', json.dumps(record).encode())


def _commit() -> str | None:
    """The commit that this package stands at, if it stands in a clone."""
    done = subprocess.run(
        ['git', '-C', str(Path(__file__).parent), 'rev-parse', 'HEAD'],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or None


def collect(out: Path) -> list[dict]:
    """All finished runs of a folder, also written to ``results.jsonl``.

    Arms come in the order in which they were asked for, then seeds.

    A folder that holds only its ``results.jsonl`` is read as it is.

    Raises:
        UsageError: If there is none.
    """
    description = out / 'comparison.json'
    order = list(
        json.loads(description.read_text())['arms']
        if description.is_file()
        else {}
    )
    files = sorted(
        out.glob('runs/*/*/result.json'),
        key=lambda file: (
            order.index(file.parts[-3]) if file.parts[-3] in order else -1,
            int(file.parts[-2]),
        ),
    )
    lines = [file.read_text() for file in files]
    results = out / 'results.jsonl'
    if lines:
        results.write_text(''.join(line + '\n' for line in lines))
    elif results.is_file():
        lines = results.read_text().splitlines()
    if not lines:
        raise UsageError(f'{out} holds no finished run')
    return [json.loads(line) for line in lines]


def by_arm(records: Sequence[dict]) -> dict[str, dict[int, dict]]:
    """Arm -> seed -> record of that run."""
    arms: dict[str, dict[int, dict]] = {}
    for record in records:
        arms.setdefault(record['arm'], {})[record['seed']] = record
    return arms


def table(records: Sequence[dict], reference: str) -> str:
    """Means, spread and paired differences, as Markdown.

    Args:
        records: Of :func:`collect`.
        reference: The arm that the others are compared with.

    Raises:
        UsageError: If there is no such arm.
    """
    arms = by_arm(records)
    if reference not in arms:
        raise UsageError(
            f'--reference {reference}: there is no such arm; there are '
            f'{", ".join(arms)}'
        )
    base = arms[reference]
    rows = [
        '| arm | seeds | final top-1 | best top-1 | '
        f'final - {reference}, 95% interval, wins | step | guidance: '
        f'parameters, multiply-adds{_size(records)} | peak memory |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for name, runs in arms.items():
        shared = [seed for seed in runs if seed in base]
        difference = ''
        if name != reference and shared:
            difference = str(paired_difference(*finals(shared, runs, base)))
        step = np.median([r['step_seconds'] for r in runs.values()])
        rows.append(
            f'| {name} | {len(runs)} | {_spread(runs, "final")} | '
            f'{_spread(runs, "best")} | {difference} | {1e3 * step:.1f} ms | '
            f'{_cost(runs)} |'
        )
    return '\n'.join(rows) + '\n'


def finals(seeds: Sequence[int], *arms: dict[int, dict]) -> list[list[float]]:
    """Final top-1 of each arm, seed by seed."""
    return [[runs[seed]['final'] for seed in seeds] for runs in arms]


def _size(records: Sequence[dict]) -> str:
    """Of the images for which multiply-adds are counted, (C, H, W)."""
    costs = [record.get('cost') or {} for record in records]
    shapes = {tuple(cost['shape']) for cost in costs if 'shape' in cost}
    return ''.join(f' at {shape}' for shape in sorted(shapes))


def _cost(runs: dict[int, dict]) -> str:
    """Of the guidance beside that of F; of the run."""
    record = next(iter(runs.values()))
    cost, relative = record.get('cost') or {}, ''
    if cost:
        more = [
            cost[f'guidance_{what}'] / cost[what]
            for what in ('parameters', 'multiply_adds')
        ]
        relative = f'+{more[0]:.1%}, +{more[1]:.1%}'
    memory = max(run.get('peak_memory', 0) for run in runs.values())
    return (
        f'{relative} | {memory / 2**20:.0f} MiB'
        if memory
        else (f'{relative} | ')
    )


def _spread(runs: dict[int, dict], key: str) -> str:
    return spread([run[key] for run in runs.values()])


if __name__ == '__main__':
    run_one(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:4])
