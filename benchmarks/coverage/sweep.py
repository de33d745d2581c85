"""Which networks of MMPretrain the three lines of config are enough for.

Every config is tried in a forked process of its own, so that one that fails,
hangs or runs out of memory costs one row of the table and no more.
"""

import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .config_check import Row, count_only, try_config

# --- many configs ----------------------------------------------------------


def sweep(
    configs: Sequence[str],
    job: Callable[..., Row] = try_config,
    jobs: int = 1,
    timeout: float = 600.0,
    memory: float | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
    **arguments: Any,
) -> list[Row]:
    """Try every config in a process of its own.

    Args:
        configs: As from :func:`classifier_configs`.
        job: What is done with each; called with a config and ``arguments``.
        jobs: Processes at a time.
        timeout: Seconds after which a config is given up.
        memory: Address space of a process in GiB; unlimited if ``None``.
        on_row: Called as soon as a row is there.

    Returns:
        A row for each config, in the order of ``configs``.
    """
    import mmpretrain.models  # noqa: F401  (once, before forking)

    context = multiprocessing.get_context('fork')
    waiting = list(configs)[::-1]
    running: dict[Connection, tuple[Any, str, float]] = {}
    rows: dict[str, Row] = {}
    while waiting or running:
        while waiting and len(running) < max(jobs, 1):
            config = waiting.pop()
            ours, theirs = context.Pipe(False)
            process = context.Process(
                target=_child, args=(theirs, job, config, memory, arguments)
            )
            process.start()
            theirs.close()
            running[ours] = (process, config, time.time())
        for pipe in wait(list(running), timeout=0.5):
            process, config, started = running.pop(pipe)
            try:
                row = pipe.recv()
            except EOFError:
                process.join()
                row = Row(
                    config,
                    reason=f'its process ended with {process.exitcode} '
                    '(out of memory?)',
                    seconds=time.time() - started,
                )
            process.join()
            rows[config] = row
            on_row(row)
        for pipe, (process, config, started) in list(running.items()):
            if time.time() - started > timeout:
                process.kill()
                process.join()
                del running[pipe]
                rows[config] = Row(
                    config,
                    reason=f'given up after {timeout:.0f} s',
                    seconds=time.time() - started,
                )
                on_row(rows[config])
    return [rows[config] for config in configs]


def _child(
    pipe: Connection,
    job: Callable[..., Row],
    config: str,
    memory: float | None,
    arguments: dict,
) -> None:
    if memory is not None:
        limit = int(memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with _quiet():
        row = job(config, **arguments)
    pipe.send(row)
    pipe.close()


@contextmanager
def _quiet() -> Iterator[None]:
    import logging
    import warnings

    if not os.environ.get('MMAUXQ_SWEEP_DEBUG'):
        logging.disable(logging.CRITICAL)
        with open(os.devnull, 'w') as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
    warnings.simplefilter('ignore')
    yield


def smallest_of_each_type(
    configs: dict[str, str], jobs: int = 1, **arguments: Any
) -> list[str]:
    """One config per type of backbone: the one with fewest parameters.

    Configs whose network does not build, or has no head, and those that are
    merged for deployment are left out if there is another.
    """

    def rank(row: Row) -> tuple:
        merged = 'deploy' in Path(row.config).parts
        return row.verdict != 'pass', merged, row.parameters, row.config

    best: dict[str, Row] = {}
    for row in sweep(list(configs), count_only, jobs, **arguments):
        kind = configs[row.config]
        best[kind] = min(row, best.get(kind, row), key=rank)
    return [best[kind].config for kind in sorted(best)]


# --- the table -------------------------------------------------------------


def as_markdown(rows: Sequence[Row]) -> str:
    """The table, with the reasons below it."""
    lines = [
        '| backbone | config | F, M parameters | quantized / float layers '
        '| taps | H, M parameters | H, multiply-adds | signed inputs '
        '| s | verdict |',
        '|---|---|--:|--:|---|--:|--:|--:|--:|---|',
    ]
    for row in rows:
        taps = f'{row.taps} ({", ".join(row.layouts)})' if row.taps else '-'
        lines.append(
            f'| {row.backbone} | {row.config} | {row.parameters:.2f} '
            f'| {row.quantized} / {len(row.kept)} | {taps} '
            f'| {row.guidance_parameters:.2f} '
            f'| {row.guidance_multiply_adds:+.1%} '
            f'| {row.signed[0]} of {row.signed[1]} '
            f'| {row.seconds:.0f} | {row.verdict} |'
        )
    usual = ('first layer', 'classifier')
    notes = []
    for row in rows:
        if row.reason:
            notes.append(f'* {row.config}: {row.verdict}, {row.reason}')
        odd: dict[str, list[str]] = {}
        for name, reason in row.kept.items():
            if reason not in usual:
                odd.setdefault(reason, []).append(name)
        for reason, names in odd.items():
            more = f' and {len(names) - 1} more' if names[1:] else ''
            notes.append(
                f'* {row.config}: float are {names[0]}{more}: {reason}'
            )
    good = sum(row.verdict == 'pass' for row in rows)
    lines += ['', f'{good} of {len(rows)} pass.', '', *notes]
    return '\n'.join(lines).rstrip() + '\n'


def as_json_lines(rows: Sequence[Row]) -> str:
    """One object per row."""
    return ''.join(json.dumps(asdict(row)) + '\n' for row in rows)


def from_json_lines(text: str) -> list[Row]:
    """Undo :func:`as_json_lines`."""
    return [Row(**json.loads(line)) for line in text.splitlines()]
