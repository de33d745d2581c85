"""Accuracy on digits in float32 and under automatic mixed precision.

    python -m tests.stress.precision --seeds 0 1 2 3 4 --epochs 8 --out DIR

The recipe aux_r20_w2a2_digits, from scratch, on the CPU in bfloat16, on a GPU
in float16 and bfloat16. DIR/precision.jsonl has a line for each run.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from mmengine.config import Config

from mmauxq import compat
from mmauxq.evaluation.trial import run_trial
from tests.conftest import ROOT


def wrappers() -> dict[str, dict]:
    """Name of a precision -> settings of the optimizer wrapper."""
    if not torch.cuda.is_available():
        return {
            'float32': {},
            'bfloat16': dict(type='mmauxq.BFloat16OptimWrapper'),
        }
    amp = dict(type='AmpOptimWrapper', loss_scale='dynamic')
    return {
        'float32': {},
        'float16': dict(amp, dtype='float16'),
        'bfloat16': dict(amp, dtype='bfloat16'),
    }


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--out', type=Path, required=True)
    args = parser.parse_args()
    compat.enable()
    results: dict[str, list[float]] = {name: [] for name in wrappers()}
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name, wrapper in wrappers().items():
            config = Config.fromfile(ROOT / 'configs/aux_r20_w2a2_digits.py')
            config.optim_wrapper.update(wrapper)
            config.train_cfg.max_epochs = args.epochs
            config.param_scheduler.T_max = args.epochs
            trial = run_trial(config, args.out / name / str(seed), seed)
            results[name].append(trial.accuracy[-1])
            line = dict(precision=name, seed=seed, top1=trial.accuracy[-1])
            with (args.out / 'precision.jsonl').open('a') as file:
                file.write(json.dumps(line) + '\n')
    spread = statistics.stdev(results['float32'])
    status = 0
    for name, values in results.items():
        mean = statistics.mean(values)
        print(f'{name}: {mean:.2f} +- {statistics.stdev(values):.2f}')
        lost = statistics.mean(results['float32']) - mean
        status |= int(lost > 2 * spread)
    return status


if __name__ == '__main__':
    sys.exit(main())
