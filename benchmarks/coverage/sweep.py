"""Try many configs, each in a forked process of its own.

One that fails, hangs or runs out of memory costs one row of the table and no
more.
"""

import importlib
import logging
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .check import count_parameters, try_config
from .row import Row

# Imported once, before forking: they are half of the time of a small network.
SLOW_TO_IMPORT = (
    'matplotlib.backends.backend_agg',
    'matplotlib.figure',
    'mmauxq.engine',
    'mmpretrain.datasets',
    'mmpretrain.engine',
    'mmpretrain.evaluation',
    'mmpretrain.models',
    'mmpretrain.visualization',
    'pkg_resources',
)


def sweep(
    configs: Sequence[str],
    job: Callable[..., Row] = try_config,
    jobs: int = 1,
    timeout: float = 600.0,
    memory: float | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
    quiet: bool = True,
    **arguments: Any,
) -> list[Row]:
    """Try every config in a process of its own.

    Args:
        configs: As of :func:`.configs.classifier_configs`.
        job: What is done with each; called with a config and ``arguments``.
        jobs: Processes at a time.
        timeout: Seconds after which a config is given up.
        memory: Address space of a process in GiB; unlimited if ``None``.
        on_row: Called with each row as it comes.
        quiet: Whether what the processes print is thrown away.

    Returns:
        A row for each config, in the order of ``configs``.
    """
    for name in SLOW_TO_IMPORT:
        importlib.import_module(name)
    context = multiprocessing.get_context('fork')
    waiting = list(configs)[::-1]
    running: dict[Connection, tuple[Any, str, float]] = {}
    rows: dict[str, Row] = {}

    def finish(config: str, row: Row) -> None:
        rows[config] = row
        on_row(row)

    while waiting or running:
        while waiting and len(running) < jobs:
            config = waiting.pop()
            ours, theirs = context.Pipe(False)
            process = context.Process(
                target=_child,
                args=(theirs, job, config, memory, quiet, arguments),
            )
            process.start()
            theirs.close()
            running[ours] = (process, config, time.time())
        for pipe in wait(list(running), timeout=0.5):
            process, config, started = running.pop(pipe)
            try:
                row = pipe.recv()
                process.join()
            except EOFError:
                process.join()
                row = Row(
                    config,
                    reason=f'its process ended with {process.exitcode} '
                    '(out of memory?)',
                    seconds=time.time() - started,
                )
            finish(config, row)
        for pipe, (process, config, started) in list(running.items()):
            seconds = time.time() - started
            if seconds > timeout:
                process.kill()
                process.join()
                del running[pipe]
                reason = f'given up after {timeout:.0f} s'
                finish(config, Row(config, reason=reason, seconds=seconds))
    return [rows[config] for config in configs]


def _child(
    pipe: Connection,
    job: Callable[..., Row],
    config: str,
    memory: float | None,
    quiet: bool,
    arguments: dict,
) -> None:
    if memory is not None:
        limit = int(memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if quiet:
        _silence()
    pipe.send(job(config, **arguments))
    pipe.close()


def _silence() -> None:
    """Throw away whatever this process prints, until it ends."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter('ignore')
    with open(os.devnull, 'w') as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)


def smallest_of_each_type(
    configs: dict[str, str], **arguments: Any
) -> list[str]:
    """One config per type of backbone: the one with fewest parameters.

    Those that ``mmauxq train`` refuses, whose network does not build or has no
    head, and those that are merged for deployment are left out if there is
    another.

    Args:
        configs: Of :func:`.configs.classifier_configs`.
        **arguments: As of :func:`sweep`.
    """

    def rank(row: Row) -> tuple:
        merged = 'deploy' in Path(row.config).parts
        return row.verdict != 'pass', merged, row.parameters, row.config

    best: dict[str, Row] = {}
    for row in sweep(list(configs), count_parameters, **arguments):
        kind = configs[row.config]
        best[kind] = min(row, best.get(kind, row), key=rank)
    return [best[kind].config for kind in sorted(best)]
