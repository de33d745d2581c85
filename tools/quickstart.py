"""The main job, on real data that needs no download.

Trains a small residual network on scikit-learn's handwritten digits: in
floating point, then at 2 bits with and without the auxiliary module, from the
float network and from scratch, each on the same budget. Evaluates the
low-precision network alone from its slim checkpoint, prints one table and
saves one figure.
"""

import argparse
import copy
import io
import json
import logging
import sys
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import mmauxq  # noqa: F401  (its configs and classes become known)
from mmauxq import compat

compat.enable()

from mmauxq.analysis import (  # noqa: E402
    block_gradient_norms,
    count_levels,
    deployed_bytes,
    operand_values,
)
from mmauxq.compare import paired_difference  # noqa: E402
from mmauxq.compare.figures import plot_overview  # noqa: E402
from mmauxq.compare.training_run import Trial, run_trial  # noqa: E402
from mmauxq.deploy import save_slim  # noqa: E402
from mmauxq.layers import restore  # noqa: E402

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'
GUIDANCE = dict(qat='plain', aux='auxiliary')
STARTS = dict(float='from float', scratch='from scratch')


def train(
    out: Path, seed: int, epochs: int, console: Console
) -> dict[str, Trial]:
    """All runs of one seed: the float network, then four at 2 bits."""
    trials = {}
    with Progress(console=console, transient=True) as progress:

        def run(name: str, recipe: str, **options) -> None:
            config = Config.fromfile(CONFIGS / recipe)
            config.log_level = 'ERROR'
            config.merge_from_dict(options)
            task = progress.add_task(f'seed {seed}: {name}', total=None)
            trials[name] = run_trial(
                config,
                out / f'seed{seed}' / name.replace(' ', '_'),
                seed,
                lambda done, of: progress.update(
                    task, completed=done, total=of
                ),
            )
            progress.remove_task(task)
            console.print(
                f'  seed {seed}: {name:24s} top-1 '
                f'{trials[name].accuracy[-1]:6.2f} %   '
                f'{trials[name].seconds:5.1f} s'
            )

        run('float', 'float_r20_digits.py')
        for start, where in STARTS.items():
            for guidance, label in GUIDANCE.items():
                options = {
                    'train_cfg.max_epochs': epochs,
                    'param_scheduler.T_max': epochs,
                }
                if start == 'float':
                    options['model.float_checkpoint'] = str(
                        trials['float'].last_checkpoint
                    )
                run(
                    f'{label} {where}',
                    f'{guidance}_r20_w2a2_digits.py',
                    **options,
                )
    return trials


def quiet() -> redirect_stdout:
    """Keeps what MMEngine prints beside its log off the screen."""
    return redirect_stdout(io.StringIO())


def evaluate_slim(trial: Trial) -> tuple[float, Path, Runner]:
    """Top-1 of F alone, built without guidance, from the slim checkpoint."""
    slim = trial.work_dir / 'slim.pth'
    save_slim(trial.last_checkpoint, slim)
    config = copy.deepcopy(trial.config)
    config.model.guidance = None
    config.model.float_checkpoint = None
    config.load_from = str(slim)
    config.work_dir = str(trial.work_dir / 'test')
    config.experiment_name = f'test_{time.time_ns()}'
    with quiet():
        runner = Runner.from_cfg(config)
        top1 = runner.test()['accuracy/top1']
    return top1, slim, runner


def some_batch(runner: Runner) -> dict:
    """128 training images, preprocessed."""
    dataset = runner.build_dataloader(
        runner.cfg.train_dataloader, seed=0
    ).dataset
    batch = pseudo_collate([dataset[i] for i in range(128)])
    return runner.model.data_preprocessor(batch, True)


def gradients(trial: Trial) -> dict[str, dict[str, float]]:
    """Gradient norms in the middle of a run that has the module."""
    config = copy.deepcopy(trial.config)
    middle = config.train_cfg.max_epochs // 2
    config.load_from = str(trial.work_dir / f'epoch_{middle}.pth')
    config.work_dir = str(trial.work_dir / 'gradients')
    config.experiment_name = f'gradients_{time.time_ns()}'
    with quiet():
        runner = Runner.from_cfg(config)
        runner.load_or_resume()
    runner.model.train()
    norms = block_gradient_norms(runner.model, **some_batch(runner))
    return {
        f'loss of F alone (epoch {middle})': norms['student'],
        "with the module's loss": norms['joint'],
    }


def mean_and_spread(values: list[float]) -> str:
    """Mean, and the standard deviation over seeds if there are several."""
    if len(values) == 1:
        return f'{values[0]:.2f}'
    return f'{np.mean(values):.2f} +- {np.std(values, ddof=1):.2f}'


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/quickstart'),
        help='folder of checkpoints, table and figure',
    )
    parser.add_argument(
        '--seeds', type=int, nargs='+', default=[0], help='default: 0'
    )
    parser.add_argument(
        '--epochs',
        type=int,
        default=8,
        help='of each network that starts at 2 bits; default: 8, at which the '
        'module is ahead from scratch (at 20, plain has caught up)',
    )
    args = parser.parse_args()
    if args.epochs < 2:
        parser.error(f'--epochs {args.epochs}: allowed are numbers from 2')
    console = Console()
    begin = time.perf_counter()

    console.print(
        'Training ResNet-20 (8-16-32) on 1,198 digits; top-1 on 599 others.'
    )
    runs = [train(args.out, seed, args.epochs, console) for seed in args.seeds]
    names = list(runs[0])
    tested, sizes, runner = {}, {}, None
    for name in names[1:]:
        tested[name] = []
        for trials in runs:
            top1, slim, runner = evaluate_slim(trials[name])
            logged = trials[name].accuracy[-1]
            if top1 != logged:
                console.print(
                    f'error: {slim} gives top-1 {top1}, training '
                    f'logged {logged}'
                )
                return 1
            tested[name].append(top1)
        sizes[name] = deployed_bytes(runner.model.architecture)
    model = runner.model.eval()
    inputs = some_batch(runner)['inputs']
    audit = count_levels(model, inputs)
    values = operand_values(model, inputs)
    tested = {'float': [t['float'].accuracy[-1] for t in runs], **tested}
    sizes = {
        'float': deployed_bytes(restore(runner.model.architecture)),
        **sizes,
    }

    table = Table(
        title=f'Digits, W2A2 (first and last layer float), {args.epochs} '
        'epochs'
    )
    for column in (
        'network',
        'top-1 (%)',
        'bytes at its bits',
        'training step',
    ):
        table.add_column(
            column, justify='left' if column == 'network' else 'right'
        )
    record = []
    for name in names:
        plain = name.replace('auxiliary', 'plain')
        steps = [t[name].step_seconds / t[plain].step_seconds for t in runs]
        overhead = f'{np.median(steps):.2f}x plain' if plain != name else ''
        if name == 'float':
            table.add_row(
                name,
                mean_and_spread(tested[name]),
                f'{sizes[name]:,}',
                '',
                end_section=True,
            )
        else:
            table.add_row(
                name,
                mean_and_spread(tested[name]),
                f'{sizes[name]:,}',
                overhead or '1.00x',
            )
        record.append(
            dict(
                network=name,
                seeds=args.seeds,
                top1=tested[name],
                bytes=sizes[name],
                step_over_plain=steps,
                accuracy=[t[name].accuracy for t in runs],
            )
        )
    console.print(table)
    for where in STARTS.values():
        difference = paired_difference(
            tested[f'auxiliary {where}'], tested[f'plain {where}']
        )
        console.print(
            f'auxiliary - plain, {where}: {difference}'
            + (' (mean, 95% interval)' if len(runs) > 1 else '')
        )

    figure = args.out / 'overview.png'
    layer = 'architecture.backbone.layer2.1.conv2'
    plot_overview(
        figure,
        f'Digits, ResNet-20 (8-16-32) at W2A2, '
        f'{len(runs)} seed{"s" * (len(runs) > 1)}',
        {name: np.array([t[name].accuracy for t in runs]) for name in names},
        gradients(runs[0]['auxiliary from scratch']),
        [
            ('an activation', values[f'{layer}.input_quantizer']),
            ('a weight', values[f'{layer}.weight_quantizer']),
        ],
    )
    with open(args.out / 'results.jsonl', 'w') as file:
        file.writelines(json.dumps(row) + '\n' for row in record)
    broken = [count.name for count in audit if not count.holds]
    console.print(
        f'{len(audit) - len(broken)} of {len(audit)} quantized '
        'tensors hold at most 4 values'
        + (f'; NOT {broken}' if broken else '.')
    )
    if len(runs) == 1:
        console.print(
            'One seed: a difference of a point or two is noise. Over five '
            'seeds the module is far ahead from scratch at 8 epochs and this '
            'learning rate; at a higher rate, or after 20 epochs, plain '
            'training is level with it. From a float start it makes no '
            'difference (docs/map.md).'
        )
    console.print(
        f'Figure: {figure}\nSlim checkpoint: {slim}\n'
        f'{time.perf_counter() - begin:.0f} s in all.'
    )
    return 1 if broken else 0


if __name__ == '__main__':
    # the full logs are in the folders; the screen shows what matters
    warnings.filterwarnings('ignore')
    logging.captureWarnings(True)
    sys.exit(main())
