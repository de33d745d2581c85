"""Accuracy on digits in float32 and under automatic mixed precision.

    python -m tests.stress.precision --seeds 5 --out DIR

The recipe aux_r20_w2a2_digits, from scratch, on the GPU if there is one
(``CUDA_VISIBLE_DEVICES=`` hides it), else on the CPU.
DIR/precision_DEVICE.jsonl has a line for each run. The exit status is 0 only
if no precision is, in the mean over the seeds, below float32 by more than the
standard deviation of float32.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from mmengine.config import Config

from mmauxq import compat
from mmauxq.compare.statistics import paired_difference
from mmauxq.compare.training_run import run_trial
from tests.conftest import ROOT

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
WRAPPERS = {
    'cpu': {
        'float32': {},
        'float16': dict(type='mmauxq.CPUAmpOptimWrapper', dtype='float16'),
        'bfloat16': dict(type='mmauxq.CPUAmpOptimWrapper'),
    },
    'cuda': {
        'float32': {},
        'float16': dict(
            type='AmpOptimWrapper', loss_scale='dynamic', dtype='float16'
        ),
        'bfloat16': dict(type='AmpOptimWrapper', dtype='bfloat16'),
    },
}[DEVICE]
"""Name of a precision -> settings of the optimizer wrapper."""


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seeds', type=int, default=5, help='how many')
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument(
        '--types', nargs='+', choices=WRAPPERS, default=list(WRAPPERS)
    )
    parser.add_argument('--device', choices=[DEVICE], default=DEVICE)
    parser.add_argument('--out', type=Path, required=True)
    args = parser.parse_args()
    compat.enable()
    names = ['float32', *(n for n in args.types if n != 'float32')]
    results: dict[str, list[float]] = {name: [] for name in names}
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / f'precision_{DEVICE}.jsonl'
    log.unlink(missing_ok=True)
    for seed in range(args.seeds):
        for name in names:
            config = Config.fromfile(ROOT / 'configs/aux_r20_w2a2_digits.py')
            config.optim_wrapper.update(WRAPPERS[name])
            config.train_cfg.max_epochs = args.epochs
            config.param_scheduler.T_max = args.epochs
            trial = run_trial(config, args.out / name / str(seed), seed)
            results[name].append(trial.accuracy[-1])
            line = dict(
                device=DEVICE,
                precision=name,
                seed=seed,
                top1=round(trial.accuracy[-1], 4),
            )
            with log.open('a') as file:
                file.write(json.dumps(line) + '\n')
    full = results['float32']
    spread = statistics.stdev(full)
    status = 0
    for name, values in results.items():
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        difference = paired_difference(values, full)
        print(f'{name}: {mean:.2f} (sd {deviation:.2f}); ', end='')
        print(f'to float32, seed by seed: {difference}')
        status |= int(difference.mean < -spread)
    return status


if __name__ == '__main__':
    sys.exit(main())
