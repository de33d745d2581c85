"""Train on digits for many steps and watch the memory of the process.

    python -m tests.stress.memory --steps 20000 --out DIR

Prints the resident memory as it goes, and its growth per 1,000 steps from
the second tenth of the run on; the exit status is 0 only if that is below
0.5 MiB.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmauxq.engine.launch import train
from tests.conftest import ROOT

PAGE = os.sysconf('SC_PAGE_SIZE') / 2**20


def resident() -> float:
    """Memory of this process in MiB."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * PAGE


@HOOKS.register_module()
class MemoryLog(Hook):
    """Writes (step, MiB) to a file."""

    def __init__(self, path: str, interval: int) -> None:
        self.path, self.interval = path, interval

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        if (runner.iter + 1) % self.interval == 0:
            with open(self.path, 'a') as file:
                line = [runner.iter + 1, round(resident(), 1)]
                file.write(json.dumps(line) + '\n')


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--steps', type=int, default=20000)
    parser.add_argument('--out', type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / 'memory.jsonl'
    log.unlink(missing_ok=True)
    config = args.out / 'config.py'
    config.write_text(
        f"_base_ = ['{ROOT}/configs/aux_r20_w2a2_digits.py']\n"
        'model = dict(architecture=dict(\n'
        '    backbone=dict(depth=8, base_channels=4),\n'
        '    head=dict(in_channels=16)))\n'
        'train_dataloader = dict(batch_size=16)\n'
        'train_cfg = dict(_delete_=True, by_epoch=False,\n'
        f'    max_iters={args.steps}, val_interval=1000)\n'
        'param_scheduler = None\n'
        'default_hooks = dict(logger=dict(interval=1000), checkpoint=dict(\n'
        '    by_epoch=False, interval=1000, max_keep_ckpts=2))\n'
        'custom_hooks = [dict(type="MemoryLog", _scope_="mmengine",\n'
        f'    path={str(log)!r}, interval={max(args.steps // 100, 1)})]\n'
    )
    status = train([str(config), '--work-dir', str(args.out / 'run')])
    points = np.array([json.loads(s) for s in log.read_text().splitlines()])
    for step, size in points[:: max(len(points) // 20, 1)]:
        print(f'{step:8.0f} steps {size:8.1f} MiB')
    late = points[len(points) // 10 :]
    slope = np.polyfit(late[:, 0], late[:, 1], 1)[0] * 1000
    print(f'{slope:.3f} MiB for 1,000 steps')
    return status or int(slope > 0.5)


if __name__ == '__main__':
    sys.exit(main())
