"""How much faster several GPUs are: ``tools/dist_train.sh`` on each number."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import torch

from mmauxq.errors import UsageError

from . import gpu_time, results
from .processes import last_words
from .recipes import OPTIONS, ROOT, amp, write_config
from .timing import GIB


def gpus_here() -> list[int]:
    """1, 2, 4, ... and all GPUs of this machine; 1 and 2 processes without."""
    count = torch.cuda.device_count() or 2
    return sorted({2**i for i in range(count.bit_length())} | {count})


def names(arms: list[str], gpus: list[int]) -> list[str]:
    """Names of measurements, ``scaling/NETWORK/WHAT/FORM/BATCH/GPUS``.

    Raises:
        UsageError: If this machine has fewer GPUs; without any, there may be
            any number of processes.
    """
    count = torch.cuda.device_count()
    for number in gpus:
        if count and number > count:
            raise UsageError(
                f'--gpus: expected 1 to {count}, the GPUs of this machine, '
                f'got {number}'
            )
    return [f'{arm}/{number}' for arm in arms for number in gpus]


def measure(
    name: str, patience: float, out: Path, steps: int, batch: int | None,
    size: int, profile: int,
) -> str:  # fmt: skip
    """Start ``tools/dist_train.sh``, and write a row of what it did.

    Args:
        name: One of :func:`names`.
        patience: Seconds after which the run is ended.
        out: Folder of ``results.jsonl`` and logs.
        steps: Number of timed steps.
        batch: Images in a step of a GPU, instead of those in the name.
        size: Height and width of the images in pixels.
        profile: Steps in the profile, after those that are timed; 0 for no
            profile.

    Returns:
        Its speed.

    Raises:
        RuntimeError: If the run does not succeed.
    """
    _, network, what, form, standard, number = name.split('/')
    batch, gpus = batch or int(standard), int(number)
    folder = out / name.replace('/', '-')
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob('*.json'):
        old.unlink()
    warmup = 10 if torch.cuda.is_available() else 1
    total = warmup + steps + (profile + 2 if profile else 0)
    hook = dict(
        type='RankLog', folder=str(folder.resolve()), begin=warmup,
        steps=steps, profile=profile,
    )  # fmt: skip
    config = write_config(
        folder, network, what, batch, batch * total * gpus, size, gpus,
        more="custom_imports = dict(imports=['benchmarks.rank_log'])\n"
        f"custom_hooks = [dict(type='SyncBuffersHook'), {hook!r}]\n",
    )  # fmt: skip
    start = time.time()
    failure = _run(
        [
            'bash', str(ROOT / 'tools/dist_train.sh'), str(config),
            str(gpus), '--work-dir', str(folder), *amp(), *OPTIONS[form],
        ],
        folder / 'output.txt',
        patience,
    )  # fmt: skip
    end = time.time()
    if failure:
        raise RuntimeError(failure)
    ranks = [
        json.loads((folder / f'rank{rank}.json').read_text())
        for rank in range(gpus)
    ]
    peaks = [
        rank['peak_bytes'] / GIB for rank in ranks if 'peak_bytes' in rank
    ]
    ms = max(rank['seconds'] for rank in ranks) / steps * 1e3
    row = dict(
        arm=name,
        network=network, what=what, form=form, batch=batch, gpus=gpus,
        ms=round(ms, 3),
        images_per_s=round(batch * gpus / ms * 1e3, 1),
        data_ms=round(max(mean(rank['data_time']) for rank in ranks) * 1e3, 3),
        peak_gib=[round(peak, 3) for peak in peaks] or None,
        repeats=steps,
        wrapper=ranks[0]['wrapper'],
        launch_s=round(ranks[0]['began'] - start, 1),
        end_s=round(end - max(rank['ended'] for rank in ranks), 1),
        seconds=round(end - start, 1),
    )  # fmt: skip
    if profile:
        events = json.loads((folder / 'trace.json').read_text())['traceEvents']
        row['split'] = gpu_time.split(events)
    results.append(out, dict(row, size=size, **results.machine()))
    return f'{row["images_per_s"]} images/s'


def _run(command: list[str], log: Path, patience: float) -> str | None:
    """Run a command; returns why it failed, or None."""
    with log.open('w') as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT,
            env={'PYTHON': sys.executable, **os.environ},
        )  # fmt: skip
        try:
            status = process.wait(patience)
        except subprocess.TimeoutExpired:
            return f'took more than {patience:.0f} s'
        finally:
            if process.poll() is None:
                process.terminate()  # the launcher ends the ranks
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    return last_words(log, f'exit status {status}') if status else None
