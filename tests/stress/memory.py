"""Train on digits for many steps and watch the memory of the process.

    python -m tests.stress.memory --steps 20000 --out DIR [--cuda-graph]

Other options are those of tools/train.py. Prints the resident memory and the
size of the newest checkpoint as they go, with a GPU also the memory that
PyTorch has allocated there, and the growth per 1,000 steps in the second half
of the run (the allocator settles in the first 5,000 steps). The exit status is
0 only if the process grows by less than 0.2 MiB, the GPU's tensors by less
than 0.05 MiB and the checkpoints by less than 1 KiB per 1,000 steps.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from tests.commands import train
from tests.conftest import ROOT

PAGE = os.sysconf('SC_PAGE_SIZE') / 2**20


def resident() -> float:
    """Memory of this process in MiB."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * PAGE


@HOOKS.register_module()
class MemoryLog(Hook):
    """Writes steps and sizes to a file."""

    priority = 'LOWEST'  # after the checkpoint of the step

    def __init__(self, path: str, interval: int) -> None:
        self.path, self.interval = path, interval

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        step = runner.iter + 1
        if step % self.interval:
            return
        line: dict[str, float] = dict(step=step, mib=round(resident(), 1))
        if torch.cuda.is_available():
            line['gpu_mib'] = round(torch.cuda.memory_allocated() / 2**20, 3)
            line['gpu_peak_mib'] = round(
                torch.cuda.max_memory_allocated() / 2**20, 3
            )
        checkpoint = Path(runner.work_dir) / f'iter_{step}.pth'
        if checkpoint.exists():
            line['checkpoint_bytes'] = checkpoint.stat().st_size
        with open(self.path, 'a') as file:
            file.write(json.dumps(line) + '\n')


def growth(points: list[dict], key: str) -> float:
    """Slope of a number per 1,000 steps, in the second half."""
    late = [p for p in points[len(points) // 2 :] if key in p]
    steps = np.array([p['step'] for p in late]) / 1000
    return float(np.polyfit(steps, [p[key] for p in late], 1)[0])


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--steps', type=int, default=20000)
    parser.add_argument('--out', type=Path, required=True)
    args, options = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / 'memory.jsonl'
    log.unlink(missing_ok=True)
    part = max(args.steps // 20, 1)
    config = args.out / 'config.py'
    config.write_text(
        f"_base_ = ['{ROOT}/configs/aux_r20_w2a2_digits.py']\n"
        'model = dict(architecture=dict(\n'
        '    backbone=dict(depth=8, base_channels=4),\n'
        '    head=dict(in_channels=16)))\n'
        'train_dataloader = dict(batch_size=16)\n'
        'train_cfg = dict(_delete_=True, by_epoch=False,\n'
        f'    max_iters={args.steps}, val_interval={part})\n'
        'param_scheduler = None\n'
        'default_hooks = dict(logger=dict(interval=1000), checkpoint=dict(\n'
        f'    by_epoch=False, interval={part},\n'
        '    max_keep_ckpts=2))\n'
        'custom_hooks = [dict(type="MemoryLog", _scope_="mmengine",\n'
        f'    path={str(log)!r}, interval={max(args.steps // 100, 1)})]\n'
    )
    status = train(
        [str(config), '--work-dir', str(args.out / 'run'), *options]
    )
    points = [json.loads(line) for line in log.read_text().splitlines()]
    for point in points[:: max(len(points) // 20, 1)]:
        print(point)
    allowed = dict(mib=0.2, checkpoint_bytes=1024)
    if torch.cuda.is_available():
        allowed.update(gpu_mib=0.05, gpu_peak_mib=0.05)
    for key, limit in allowed.items():
        slope = growth(points, key)
        print(f'{key}: {slope:+.3f} per 1,000 steps (allowed: {limit})')
        status = status or int(slope > limit)
    return status


if __name__ == '__main__':
    sys.exit(main())
