"""How long an iteration of ``tools/train.py`` takes."""

import json
import statistics
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmauxq import compat
from mmauxq.cli import run

from .processes import Turn
from .recipes import OPTIONS, PEER, amp, write_config


def measure(
    network: str, what: str, form: str, batch: int, size: int, steps: int,
    work_dir: Path, turn: Turn,
) -> dict:  # fmt: skip
    """Train on generated images, and read the times from the log.

    Args:
        network: Short name of a network in the recipes, such as ``'r50'``.
        what: A key of ``RECIPES``, or ``PEER``.
        form: A key of ``OPTIONS``.
        batch: Images in a step.
        size: Height and width of the images in pixels.
        steps: Iterations; those before the 20th, or the first half of fewer,
            do not count. The log has the mean of each fifty.
        work_dir: Folder of config and logs.
        turn: Taken for the whole run.

    Raises:
        RuntimeError: If the training fails.
    """
    each = max(1, min(50, steps // 4))
    config = write_config(
        work_dir, network, what, batch, batch * steps, size,
        more=f'default_hooks["logger"] = dict(interval={each})\n',
    )  # fmt: skip
    arguments = [
        str(config), '--work-dir', str(work_dir), *amp(), *OPTIONS[form],
    ]  # fmt: skip
    turn.take()
    if what == PEER:
        _train_peer(config, form, work_dir)
    elif status := run('train', arguments):
        raise RuntimeError(f'tools/train.py {" ".join(arguments)}: {status}')
    turn.give()
    log = max(work_dir.rglob('scalars.json'))  # not those of earlier runs
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records = [record for record in records if 'time' in record]
    late = records[min(max(1, 20 // each), len(records) // 2) :]
    # MMEngine counts memory anew after each record, and a recorded step
    # allocates nothing: the first record has the peak
    peak = max(record.get('memory', 0) for record in records) / 2**10
    times = sorted(1e3 * record['time'] for record in late)
    low, high = (times[round(p * (len(times) - 1))] for p in (0.1, 0.9))
    data = [1e3 * record.get('data_time', 0.0) for record in late]
    return dict(
        ms=round(statistics.median(times), 3),
        low=round(low, 3),
        high=round(high, 3),
        data_ms=round(statistics.median(data), 3),
        repeats=len(late) * each,
        peak_gib=peak or None,
    )


def _train_peer(config: Path, form: str, work_dir: Path) -> None:
    """What MMPretrain's own ``tools/train.py --amp`` does."""
    compat.register_config_scope()
    cfg = Config.fromfile(config)
    cfg.work_dir, cfg.compile = str(work_dir), form == 'compiled'
    if torch.cuda.is_available():
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.dtype = 'bfloat16'
    init_default_scope('mmpretrain')
    Runner.from_cfg(cfg).train()
