"""Kill a rank of tools/dist_train.sh, resume on as many and on fewer ranks.

    python -m tests.stress.dead_rank --ranks 8 --then 8 4 --out DIR

A small recipe on digits (NCCL and SyncBN with as many GPUs, else gloo). The
last rank kills itself in the middle of the second epoch. The job must end
within a minute with a message and no exit status of success. Then it is
resumed on each number of ranks, each time from a copy of what was left, and
must go on at the step that follows the last checkpoint, counted in its own
steps, and end with a checkpoint of the last epoch. At last the launcher itself
is killed in the second epoch, and all ranks must be gone half a minute later.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.conftest import ROOT

HOOK = """
import os, time
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module(force=True)
class Dying(Hook):
    def before_train_iter(self, runner, *args, **kwargs):
        last = os.environ['RANK'] == str(int(os.environ['WORLD_SIZE']) - 1)
        if last and runner.iter == {step} and not os.path.exists({mark!r}):
            with open({mark!r}, 'w') as file:
                file.write(str(time.time()))
            os.kill(os.getpid(), 9)
"""
CONFIG = """
_base_ = ['{root}/configs/aux_r20_w2a2_digits.py']
custom_imports = dict(imports=['dying'])
custom_hooks = [dict(type='SyncBuffersHook'),
    dict(type='Dying', _scope_='mmengine')]
model = dict(architecture=dict(
    backbone=dict(depth=8, base_channels=4), head=dict(in_channels=16)))
train_dataloader = dict(batch_size=4, dataset=dict(indices={images}))
val_dataloader = dict(dataset=dict(indices=64))
train_cfg = dict(max_epochs=3)
param_scheduler = dict(T_max=3)
default_hooks = dict(logger=dict(interval=5),
    checkpoint=dict(interval=5, by_epoch=False, max_keep_ckpts=-1))
sync_bn = {sync_bn!r}
"""
ENDLESS = '--cfg-options', 'train_cfg.max_epochs=1000000'
STEPS = 20
"""In an epoch, on all ranks."""


def job(folder: Path, ranks: int, run: Path, *more: str) -> dict:
    """Arguments of subprocess for a job."""
    environment = {
        **os.environ,
        'PYTHON': sys.executable,
        'PYTHONPATH': f'{ROOT}:{folder}',
    }
    words = ['bash', f'{ROOT}/tools/dist_train.sh', f'{folder}/config.py']
    words += [str(ranks), '--work-dir', str(run), *more]
    return dict(args=words, env=environment, text=True)


def start(folder: Path, ranks: int, run: Path, *more: str):
    """(exit status, seconds, output) of a job."""
    begin = time.time()
    done = subprocess.run(
        **job(folder, ranks, run, *more), capture_output=True, timeout=1200
    )
    text = done.stdout + done.stderr
    (folder / f'{run.name}.txt').write_text(text)
    return done.returncode, time.time() - begin, text


def orphans(folder: Path, ranks: int) -> list[str]:
    """The ranks that live half a minute after their launcher."""
    run = folder / 'launcher'
    with open(f'{run}.txt', 'w') as log:
        launcher = subprocess.Popen(
            **job(folder, ranks, run, *ENDLESS), stdout=log, stderr=log
        )
    saved = run / f'iter_{STEPS + 5}.pth'
    while not saved.exists() and launcher.poll() is None:
        time.sleep(0.1)
    launcher.kill()
    launcher.wait()
    time.sleep(30)
    words = ['pgrep', '-f', f'train.py {folder}/config.py']
    found = subprocess.run(words, capture_output=True, text=True).stdout
    assert saved.exists(), 'the launcher was killed too early'
    return found.split()


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--ranks', type=int, default=8)
    parser.add_argument('--then', type=int, nargs='+', default=[8, 4])
    parser.add_argument('--out', type=Path, required=True)
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    folder = args.out.resolve()
    mark, dies = folder / 'died', STEPS + 12
    (folder / 'dying.py').write_text(HOOK.format(step=dies, mark=str(mark)))
    cuda = torch.cuda.device_count() >= args.ranks
    (folder / 'config.py').write_text(
        CONFIG.format(
            root=ROOT,
            images=STEPS * 4 * args.ranks,
            sync_bn='torch' if cuda else None,
        )
    )
    status, _, text = start(folder, args.ranks, folder / 'killed')
    waited = time.time() - float(mark.read_text())
    said = re.findall('error: rank .*', text)
    line = dict(
        ranks=args.ranks, gpus=cuda, status=status, said=said[-1:],
        seconds_to_the_end=round(waited, 1),
    )  # fmt: skip
    good = status != 0 and waited < 60 and bool(said)
    print(line, flush=True)
    lines = [line]
    for ranks in args.then:
        run = folder / f'on{ranks}'
        shutil.copytree(folder / 'killed', run)
        status, seconds, text = start(folder, ranks, run, '--resume')
        at = re.findall(r'resumed epoch: (\d+), iter: (\d+)', text)
        # 10 of 20 steps of the second epoch were saved
        length = STEPS * args.ranks // ranks
        expected = [('1', str(length + length // 2))]
        last = (run / 'last_checkpoint').read_text() if not status else ''
        line = dict(
            ranks=ranks, status=status, resumed=at, expected=expected,
            said=re.findall('an epoch has .*', text)[:1],
            last=Path(last).name, seconds=round(seconds, 1),
        )  # fmt: skip
        good = good and status == 0 and at[:1] == expected
        good = good and line['last'] == f'iter_{3 * length}.pth'
        print(line, flush=True)
        lines.append(line)
    (folder / 'died').touch()  # no rank kills itself any more
    line = dict(ranks=args.ranks, orphans=orphans(folder, args.ranks))
    good = good and not line['orphans']
    print(line, flush=True)
    lines.append(line)
    with (folder / 'results.jsonl').open('w') as file:
        file.writelines(json.dumps(line) + '\n' for line in lines)
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
