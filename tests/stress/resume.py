"""Kill the digits recipe at random points, resume it, compare to the bit.

    python -m tests.stress.resume --kills 50 --out DIR

Each run is killed once or twice: at a random moment, at a random step, as a
random validation begins, or while a random file is written, and then resumed.
DIR/results.jsonl has a line for each; the exit status is 0 only if no run
differs.
"""

import argparse
import random
import shutil
import sys
import time
from pathlib import Path

import mmauxq.algorithms  # noqa: F401  (before anything is forked)
from mmauxq import compat
from tests.conftest import ROOT
from tests.support import killing

# the teacher is F before it is trained: what it knows does not matter here
KINDS = {
    'qat': '',
    'aux': '',
    'dsn': '',
    'kd': 'model = dict(guidance=dict(least_accuracy=0))\n',
    'auxkd': (
        'guidance = _base_.model.guidance\n'
        'guidance[0]["separate_bn"] = True\n'
        'guidance[0]["guides_student"] = dict(type="mmrazor.KLDivergence")\n'
        'guidance[1]["least_accuracy"] = 0\n'
        'guidance[1]["guides_aux"] = dict(type="mmrazor.KLDivergence")\n'
        'model = dict(guidance=guidance)\n'
        'del guidance\n'
    ),
}
EXTRAS = {
    'plain': '',
    'amp': "optim_wrapper = dict(type='mmauxq.CPUAmpOptimWrapper')\n",
    'amp float16': (
        "optim_wrapper = dict(type='mmauxq.CPUAmpOptimWrapper',\n"
        "    dtype='float16')\n"
    ),
    'ema': (
        'custom_hooks = [dict(type="SyncBuffersHook"),\n'
        '    dict(type="EMAHook", momentum=0.01)]\n'
    ),
    'by iteration': (
        'train_cfg = dict(\n'
        '    _delete_=True, by_epoch=False, max_iters=57, val_interval=10)\n'
        'default_hooks["checkpoint"].update(interval=5, by_epoch=False)\n'
    ),
}
WEIGHT = (
    'custom_hooks = [*globals().get("custom_hooks", []),\n'
    '    dict(type="mmauxq.GuidanceWeightHook", index={}, end_weight=0.1)]\n'
)
STAGES = ('half', 'before rename', 'after rename')


def write_config(folder: Path, kind: str, extra: str) -> Path:
    """Three epochs of the recipe, 57 steps."""
    path = folder / 'config.py'
    path.write_text(
        f"_base_ = ['{ROOT}/configs/{kind}_r20_w2a2_digits.py']\n"
        f"experiment_name = '{kind}_{folder.name}'\n"
        'randomness = dict(seed=0)\n'
        'train_cfg = dict(max_epochs=3)\n'
        'param_scheduler = dict(T_max=3)\n'
        'default_hooks = dict(checkpoint=dict(max_keep_ckpts=2),\n'
        '    logger=dict(interval=1))\n'
        + KINDS[kind]
        + EXTRAS[extra]
        + WEIGHT.format(0 if kind == 'auxkd' else None) * (kind != 'qat')
    )
    return path


def some_point(dice: random.Random, seconds: float):
    """(what, prepare, kill_after) of one kill."""
    what = dice.choice(('moment', 'step', 'validation', 'file'))
    if what == 'moment':
        after = dice.uniform(0, seconds)
        return f'after {after:.2f} s', (lambda: None), after
    if what == 'step':
        step = dice.randrange(57)
        return f'step {step}', killing.at_step(step), None
    if what == 'validation':
        number = dice.randrange(3)
        return f'validation {number}', killing.in_validation(number), None
    number, stage = dice.randrange(9), dice.choice(STAGES)
    return f'file {number}, {stage}', killing.in_write(number, stage), None


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    compat.enable_safe_checkpoints()
    dice = random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    whole, done, lost = {}, 0, 0
    with (args.out / 'results.jsonl').open('a') as results:
        while done < args.kills:
            kind = list(KINDS)[done % len(KINDS)]
            extra = dice.choice(list(EXTRAS))
            folder = args.out / f'{kind}_{extra}'.replace(' ', '_')
            if folder not in whole:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                config = write_config(folder, kind, extra)
                begin = time.monotonic()
                words = [config, '--work-dir', folder / 'whole']
                status = killing.run_train(words, folder / 'log')
                assert status == 0, (folder / 'log').read_text()[-3000:]
                whole[folder] = time.monotonic() - begin
            killed = folder / 'killed'
            shutil.rmtree(killed, ignore_errors=True)
            words = [folder / 'config.py', '--work-dir', killed, '--resume']
            log = folder / 'log'
            points = []
            for _ in range(dice.choice((1, 2))):
                what, prepare, after = some_point(dice, whole[folder])
                status = killing.run_train(words, log, prepare, after)
                if status == -9:
                    points.append(what)
                    done += 1
            status = killing.run_train(words, log)
            ends = [
                Path((folder / name / 'last_checkpoint').read_text())
                for name in ('whole', 'killed')
            ]
            differing = killing.differences(*ends) if status == 0 else ['*']
            if ends[0].name != ends[1].name:
                differing.append('name')
            lost += bool(differing)
            line = dict(
                kind=kind, extra=extra, killed=points, differing=differing
            )
            killing.keep_line(results, done, line)
    print(f'{done} kills, {lost} runs that differ')
    return 1 if lost else 0


if __name__ == '__main__':
    sys.exit(main())
