"""Kill export and compare at random moments, and run the same command again.

    python -m tests.stress.kills export --kills 50 --out DIR
    python -m tests.stress.kills compare --kills 50 --out DIR

Every kill is SIGKILL of the command as it is typed, with all of its
processes or alone. What must hold: a note that the user keeps in the folder
is there; the folder of an export is new, or as it was, or is seen to be mixed;
the same command then ends well, with the result of one that nobody killed,
and leaves nothing else. DIR/results.jsonl has a line for each kill; the exit
status is 0 only if nothing was lost. For training see tests.stress.resume.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT, process_environment
from tests.support.killing import keep_line

NOTE = 'notes.txt'


def command(*words: object) -> list[str]:
    """The words of a command."""
    return [sys.executable, '-m', 'mmauxq', *map(str, words)]


def run(words: list[str], log: Path, seconds: float = 0, alone: bool = False):
    """Run a command, killed after ``seconds`` if that is not 0; its status.

    Args:
        words: Of the command.
        log: What it prints is appended to it.
        seconds: Until the kill.
        alone: Whether the processes that it started are left to themselves.
    """
    with open(log, 'a') as out:
        process = subprocess.Popen(
            words, stdout=out, stderr=out, start_new_session=True,
            env=process_environment(), cwd=ROOT,
        )  # fmt: skip
    try:
        return process.wait(seconds or None)
    except subprocess.TimeoutExpired:
        kill = os.kill if alone else os.killpg
        kill(process.pid, signal.SIGKILL)
        return process.wait()


def hashes(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files of a folder, the report's times aside."""
    found = {}
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.is_file() and file.name not in ('report.json', 'report.md'):
            found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


class Export:
    """What is checked of an export."""

    def __init__(self, out: Path) -> None:
        self.out, self.log = out, out / 'log.txt'
        recipe = ROOT / 'configs/qat_r8_w2a2_digits.py'
        run_dir = out / 'run'
        words = command(
            'train', recipe, '--work-dir', run_dir, '--cfg-options',
            'train_cfg.max_epochs=2', 'param_scheduler.T_max=2',
            'default_hooks.checkpoint.max_keep_ckpts=2',
            'default_hooks.checkpoint.interval=1',
        )  # fmt: skip
        assert run(words, self.log) == 0, self.log.read_text()[-2000:]
        self.folder = out / 'ship'
        export = command('export', recipe)
        rest = ['--out', str(self.folder), '--images', '64']
        self.words = [*export, str(run_dir / 'slim.pth'), *rest]
        self.states = []
        for file in ('epoch_1.pth', 'slim.pth'):
            words = [*export, str(run_dir / file), *rest]
            assert run(words, self.log) == 0, self.log.read_text()[-2000:]
            self.states.append(hashes(self.folder))
            shutil.copytree(self.folder, out / f'state{len(self.states)}')

    def prepare(self, dice: random.Random) -> str:
        """The folder before a kill."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if dice.random() < 0.5:
            self.folder.mkdir()
            before = {}
        else:
            shutil.copytree(self.out / 'state1', self.folder)
            before = self.states[0]
        (self.folder / NOTE).write_text('a note')
        self.before = before
        return 'an earlier export' if before else 'nothing'

    def found(self) -> str:
        """What a kill left: 'old', 'new', or 'mixed', which must show."""
        now = hashes(self.folder)
        if now.pop(NOTE, '') != hashlib.sha256(b'a note').hexdigest():
            return 'note lost'
        now = {k: v for k, v in now.items() if k in self.states[1]}
        if now == self.before:
            return 'old'
        report = self.folder / 'report.json'
        stored = {}
        if report.is_file():
            stored = json.loads(report.read_bytes())['sha256']
            stored = {k: v for k, v in stored.items() if k in now}
        if now == self.states[1] and stored == now:
            return 'new'
        return 'mixed' if stored != now else 'lost'

    def complete(self) -> bool:
        """Whether the command that was run again left the whole, and no
        more."""
        names = {p.name for p in self.folder.iterdir()} - {NOTE}
        now = hashes(self.folder)
        return (
            now.pop(NOTE, '') != ''
            and now == self.states[1]
            and names == {*now, 'report.json', 'report.md'}
        )


class Compare:
    """What is checked of a comparison."""

    def __init__(self, out: Path) -> None:
        self.log, self.folder = out / 'log.txt', out / 'compared'
        self.words = command(
            'compare', '--arms',
            f'qat={ROOT}/configs/qat_r8_w2a2_digits.py',
            f'aux={ROOT}/configs/aux_r8_w2a2_digits.py',
            '--seeds', '0', '--jobs', '2', '--out', self.folder,
            '--cfg-options', 'train_cfg.max_epochs=1',
            'param_scheduler.T_max=1',
        )  # fmt: skip
        assert run(self.words, self.log) == 0, self.log.read_text()[-2000:]
        self.expected = self.results()

    def results(self) -> list[tuple]:
        """Arm, seed and accuracies of the finished runs."""
        lines = (self.folder / 'results.jsonl').read_text().splitlines()
        records = map(json.loads, lines)
        return [(r['arm'], r['seed'], r['accuracy']) for r in records]

    def prepare(self, dice: random.Random) -> str:
        """The folder before a kill."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        (self.folder / NOTE).write_text('a note')
        return 'nothing'

    def found(self) -> str:
        """What a kill left."""
        runs = list(self.folder.glob('runs/*/*/result.json'))
        note = (self.folder / NOTE).read_text() == 'a note'
        return f'{len(runs)} finished runs' if note else 'note lost'

    def complete(self) -> bool:
        """As of :class:`Export`."""
        parts = [*self.folder.rglob('*.part'), *self.folder.rglob('.mmauxq*')]
        return (
            self.results() == self.expected
            and not parts
            and (self.folder / NOTE).is_file()
            and (self.folder / 'table.md').is_file()
        )


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('what', choices=['export', 'compare'])
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    dice = random.Random(args.seed)
    args.out.mkdir(parents=True)
    case = Export(args.out) if args.what == 'export' else Compare(args.out)
    case.prepare(dice)
    begin = time.monotonic()
    assert run(case.words, case.log) == 0
    seconds = time.monotonic() - begin
    kills = lost = 0
    with open(args.out / 'results.jsonl', 'a') as results:
        while kills < args.kills:
            line = dict(command=args.what, before=case.prepare(dice))
            after, alone = dice.uniform(0, seconds), dice.random() < 0.5
            line |= dict(seconds=round(after, 2), alone=alone)
            if run(case.words, case.log, after, alone) != -signal.SIGKILL:
                continue
            kills += 1
            line['found'] = case.found()
            line['again'] = run(case.words, case.log)
            line['complete'] = line['again'] == 0 and case.complete()
            lost += 'lost' in line['found'] or not line['complete']
            keep_line(results, kills, line)
    print(f'{kills} kills, {lost} with a loss')
    return 1 if lost else 0


if __name__ == '__main__':
    sys.exit(main())
