"""The main job, on real data that needs no download.

Trains a small residual network on scikit-learn's handwritten digits: in
floating point, and from there at 2 bits, without and with the auxiliary
module. Prints how they compare, draws a figure, writes the low-precision
network alone, and loads that back to classify one image.
"""

import argparse
import copy
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from quickstart_progress import Progress

from mmauxq.cli.parser import integer
from mmauxq.cli.run_command import exit_process, run_command
from mmauxq.errors import TrainingError, UsageError
from mmauxq.optional import need

CONFIGS = Path(__file__).resolve().parent.parent / 'configs'
FLOAT, PLAIN, MODULE = 'float', 'plain W2A2', 'W2A2 with the module'
RECIPES = {
    FLOAT: 'float_r8_digits',
    PLAIN: 'qat_r8_w2a2_digits',
    MODULE: 'aux_r8_w2a2_digits',
}
LAYER = 'backbone.layer2.0.conv2'

# Seconds on an idle core, for the time that is left
LOADING, FINISHING, SETUP = 8.0, 4.0, 1.0
STEP = {FLOAT: 0.014, PLAIN: 0.028, MODULE: 0.036}
STEPS_PER_EPOCH = 19

CLASSIFY = """\
from mmpretrain import ImageClassificationInferencer
classify = ImageClassificationInferencer({config!r}, {slim!r})
print(classify({image!r})[0]['pred_class'])
"""
REPORT = f"""\
{{table}}

Figure: {{out}}/quickstart.png; numbers: {{out}}/results.jsonl
{{out}}/slim.pth is what ships of "{{module}}", seed {{seed}}:
the network alone, {{size:,}} bytes in float32 until tools/export.py packs it.
Read back, it has the top-1 that training logged, {{top1:.2f}} %.

{{out}}/digit.png shows the digit {{digit}}. Three lines of Python (that
of .venv) classify it:

{{lines}}
They print: {{printed}}

Next, the same recipe by hand, and more seeds:

. .venv/bin/activate
python tools/train.py configs/{RECIPES[MODULE]}.py \\
    --cfg-options model.float_checkpoint={{start}}
python tools/compare.py --out {{out}}_compare --seeds 0 1 2 3 4 --jobs 2 \\
    --float configs/{RECIPES[FLOAT]}.py \\
    --arms plain=configs/{RECIPES[PLAIN]}.py \\
    module=configs/{RECIPES[MODULE]}.py
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the quick start."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/quickstart'),
        help='folder of everything that is written '
        '(default: work_dirs/quickstart)',
    )
    parser.add_argument(
        '--seeds',
        type=integer(0),
        nargs='*',
        default=[0, 1, 2],
        help='one run of each network for each (default: 0 1 2)',
    )
    parser.add_argument(
        '--epochs',
        type=integer(2),
        default=5,
        help='of each 2-bit network (default: 5); the float network, which '
        'they start from, trains twice as long',
    )


def run(args: argparse.Namespace, started: Callable) -> int:
    """The job; 130 if it was interrupted."""
    check(args)
    try:
        print(job(args, started))
    except KeyboardInterrupt:
        print('stopped; the same command begins anew', file=sys.stderr)
        return 130
    return 0


def job(args: argparse.Namespace, started: Callable) -> str:
    """Train, compare, ship, classify; returns what is to be read."""
    warnings.filterwarnings('ignore')
    logging.captureWarnings(True)
    seconds = {
        name: SETUP + STEP[name] * STEPS_PER_EPOCH * epochs_of(name, args)
        for name in RECIPES
    }
    total = LOADING + FINISHING + len(args.seeds) * sum(seconds.values())
    # the logs of MMEngine are in the folders of the runs
    with Progress(total) as progress, redirect_stdout(io.StringIO()):
        progress.log(
            'ResNet-8 (8-16-32 channels) trains on 1,198 handwritten digits '
            'of\n8 x 8 pixels; top-1 is of 599 others.'
        )
        progress.begin('loading PyTorch and the OpenMMLab packages', LOADING)
        from mmauxq import compat

        compat.enable()
        import mmauxq.compare.training_run  # noqa: F401

        started()
        trials = train(args, seconds, progress)
        progress.begin('writing table, figure and slim file', FINISHING)
        network = ship(args.out, trials[MODULE][0])
        rows = results(args.seeds, trials, network)
        draw(args, trials, network)
        lines = CLASSIFY.format(
            config=str(args.out / 'slim.py'),
            slim=str(args.out / 'slim.pth'),
            image=str(args.out / 'digit.png'),
        )
        printed: list[str] = []
        exec(lines, dict(print=printed.append))
    trial, start = trials[MODULE][0], trials[FLOAT][0].last_checkpoint
    return REPORT.format(
        table=table(rows, args),
        out=args.out,
        size=(args.out / 'slim.pth').stat().st_size,
        module=MODULE,
        seed=args.seeds[0],
        top1=trial.accuracy[-1],
        digit=digit()['gt_label'],
        lines=lines,
        printed=printed[0],
        start=start,
    )


def check(args: argparse.Namespace) -> None:
    """Refuse what would fail after minutes.

    Raises:
        UsageError: If there is nothing to train, or no place to write to.
    """
    if not args.seeds or len(set(args.seeds)) < len(args.seeds):
        raise UsageError(
            '--seeds: expected one or more different integers, got '
            f'{" ".join(map(str, args.seeds)) or "none"}'
        )
    if max(args.seeds) >= 2**32:
        raise UsageError(
            f'--seeds: expected integers below 2**32, got {max(args.seeds)}'
        )
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise UsageError(
            '--out: expected a folder that can be written, got '
            f'{args.out} ({error.strerror})'
        ) from error
    need('sklearn', 'matplotlib', 'rich', 'scipy')


def epochs_of(name: str, args: argparse.Namespace) -> int:
    """Epochs of a network; a float network has twice as many."""
    return args.epochs * (2 if name == FLOAT else 1)


def train(
    args: argparse.Namespace, seconds: dict[str, float], progress: Progress
) -> dict[str, list]:
    """Name of a network -> its run with each seed.

    Both 2-bit networks of a seed start from the float network of that seed.
    """
    from mmengine.config import Config

    from mmauxq.compare.training_run import run_trial

    trials: dict[str, list] = {name: [] for name in RECIPES}
    for seed in args.seeds:
        for name, recipe in RECIPES.items():
            # formatting it as MMEngine does takes as long as 10 steps
            config = Config.fromfile(
                CONFIGS / f'{recipe}.py', format_python_code=False
            )
            config.log_level = 'ERROR'
            config.train_cfg.max_epochs = epochs_of(name, args)
            config.param_scheduler.T_max = epochs_of(name, args)
            if name != FLOAT:
                start = trials[FLOAT][-1].last_checkpoint
                config.model.float_checkpoint = str(start)
            progress.begin(f'seed {seed}: {name}', seconds[name], True)
            folder = args.out / f'seed{seed}' / recipe
            trial = run_trial(config, folder, seed, progress.step)
            trials[name].append(trial)
            progress.log(
                f'seed {seed}: {name}, {epochs_of(name, args)} epochs: '
                f'top-1 {trial.accuracy[-1]:.2f} %'
            )
    return trials


def ship(out: Path, trial):
    """Write the files that classify an image; returns F, read back.

    Raises:
        TrainingError: If it has not the accuracy of its training.
    """
    import mmcv
    from mmengine.config import Config

    from mmauxq.deploy import slim_checkpoint
    from mmauxq.deploy.network import load_network

    slim = out / 'slim.pth'
    slim_checkpoint(trial.last_checkpoint, slim)
    config = copy.deepcopy(trial.config)
    config.model.update(guidance=None, float_checkpoint=None)
    network = load_network(config, str(slim))
    pairs = [
        (network.algorithm(images, mode='tensor').argmax(1), labels)
        for images, labels in network.batches()
    ]
    right = sum(int((found == labels).sum()) for found, labels in pairs)
    top1 = 100 * right / sum(len(labels) for _, labels in pairs)
    if abs(top1 - trial.accuracy[-1]) > 1e-3:
        raise TrainingError(
            f'{slim}: expected top-1 {trial.accuracy[-1]}, got {top1}'
        )
    # Files are read as colour; a digit has three equal channels then
    one = dict(type='RandomGrayscale', prob=1.0, channel_weights=(1, 0, 0))
    pipeline = [dict(type='LoadImageFromFile'), one, dict(type='PackInputs')]
    dataset = dict(type='mmauxq.Digits', split='test', pipeline=pipeline)
    Config(
        dict(
            model=config.model,
            data_preprocessor=config.data_preprocessor,
            test_dataloader=dict(dataset=dataset),
        )
    ).dump(out / 'slim.py')
    mmcv.imwrite(digit()['img'], str(out / 'digit.png'))
    return network


def digit() -> dict:
    """A test image, and its label."""
    from mmauxq.datasets import Digits

    # the first two are hard to read at 8 x 8 pixels
    return Digits('test').get_data_info(2)


def results(seeds: list[int], trials: dict[str, list], network) -> list[dict]:
    """What each network reached and takes, with all numbers of the table."""
    from mmauxq.analysis import deployed_bytes
    from mmauxq.compare import paired_difference
    from mmauxq.layers import restore

    size = deployed_bytes(network.architecture)
    float_size = deployed_bytes(restore(copy.deepcopy(network.architecture)))
    rows: list[dict] = []
    for name, runs in trials.items():
        row = dict(
            network=name,
            seeds=seeds,
            top1=[trial.accuracy[-1] for trial in runs],
            bytes=float_size if name == FLOAT else size,
            accuracy=[trial.accuracy for trial in runs],
        )
        if rows:  # float -> plain -> with the module
            row['minus'] = rows[-1]['network']
            change = paired_difference(row['top1'], rows[-1]['top1'])
            row['difference'] = change.mean
            if change.pairs > 1:
                row['interval'] = change.half_width
        rows.append(row)
    return rows


def table(rows: list[dict], args: argparse.Namespace) -> str:
    """The results as text; also written to ``results.jsonl``."""
    from mmauxq.compare.statistics import spread, with_interval

    (args.out / 'results.jsonl').write_text(
        ''.join(json.dumps(row) + '\n' for row in rows)
    )
    count = len(args.seeds)
    head = 'of one seed'
    if count > 1:
        head = f'of {count} seeds, mean ± standard deviation'
    lines = [
        f'Top-1 {head}. The 2-bit networks train {args.epochs}',
        'epochs from the float network; their first and last layer stay '
        'float.',
        '',
        f'{"network":22}{"top-1 (%)":>14}{"bytes at its bits":>20}',
    ]
    for row in rows:
        lines.append(
            f'{row["network"]:22}{spread(row["top1"]):>14}{row["bytes"]:>20,}'
        )
    interval = ', paired by seed, and their 95% interval' if count > 1 else ''
    lines += ['', f'Differences{interval}:']
    for row in rows[1:]:
        width = row.get('interval', float('inf'))
        change = with_interval(row['difference'], width)
        lines.append(f'{row["network"]} - {row["minus"]}: {change}')
        lines.append(f'    {in_words(row["difference"], width, count)}')
    return '\n'.join(lines)


def in_words(mean: float, width: float, count: int) -> str:
    """What a paired difference says."""
    if width == float('inf'):
        return 'one seed says nothing'
    if abs(mean) <= width:
        return f'no difference seen: within the spread of {count} seeds'
    return f'{"better" if mean > 0 else "worse"}: 0 is outside of the interval'


def draw(args: argparse.Namespace, trials: dict[str, list], network) -> None:
    """The figure."""
    import numpy as np
    from quickstart_figure import plot_quickstart

    layer = network.architecture.get_submodule(LAYER)
    tensors: dict[str, tuple] = {}
    for what, quantizer in (
        ('weight', layer.weight_quantizer),
        ('input', layer.input_quantizer),
    ):
        quantizer.register_forward_hook(
            lambda _, given, made, what=what: tensors.update(
                {what: (given[0].detach(), made.detach())}
            )
        )
    ((images, _),) = network.images(250)
    network.algorithm(images, mode='tensor')
    several = len(args.seeds) > 1
    plot_quickstart(
        args.out / 'quickstart.png',
        'Digits, ResNet-8 (8-16-32) at 2 bits, seed'
        f'{"s" * several} {", ".join(map(str, args.seeds))}',
        {
            name: np.array([trial.accuracy for trial in runs])
            for name, runs in trials.items()
        },
        f'{LAYER.removeprefix("backbone.")} of {MODULE}, seed {args.seeds[0]}',
        {
            f'{what} of the layer': tensors[what]
            for what in ('weight', 'input')
        },
    )


if __name__ == '__main__':
    exit_process(run_command(sys.modules[__name__]))
