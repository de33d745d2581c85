"""Try a part: type its commands, and judge what they do."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..configs import WIDTH
from .part import NOT_FOR, TRAIN, Part, Row
from .project import ROOT, TOOLS, write_project

PATIENCE = 180
"""Seconds that one command may take."""
STATUS = 'exit status'
SHARED = 'trained'
"""Folder of the network that the tools share, by its data."""


@dataclass(frozen=True)
class Outcome:
    """Of commands.

    Args:
        status: Of the last one.
        output: Of all of them.
        errors: What the last one wrote on stderr.
    """

    status: int
    output: str
    errors: str

    @property
    def message(self) -> str:
        """Why it failed: a line."""
        lines = [
            line
            for line in self.errors.splitlines()
            # of a launcher; the lines of its ranks say why
            if line.strip() and not line.endswith('job was stopped')
        ]
        ours = [line for line in lines if line.startswith('error: ')]
        line = (ours or lines or [f'{STATUS} {self.status}'])[-1]
        line = re.sub(' at 0x[0-9a-f]+', '', line)  # differs between runs
        return line.removeprefix('error: ').strip()

    @property
    def is_refusal(self) -> bool:
        """Whether it is one line with status 2, and no traceback."""
        lines = self.errors.strip().splitlines()
        return (
            self.status == 2
            and len(lines) == 1
            and lines[0].startswith('error: ')
            and 'Traceback' not in self.output
        )


def run_commands(commands: list[str], folder: Path) -> Outcome:
    """Run commands in a folder until one fails."""
    words = dict(
        mmauxq=f'{shlex.quote(sys.executable)} -m mmauxq',
        python=shlex.quote(sys.executable),
        root=shlex.quote(str(ROOT)),
        tools=shlex.quote(str(TOOLS)),
    )
    environment = dict(
        os.environ,
        PYTHON=sys.executable,
        PYTHONPATH=os.pathsep.join(
            filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])
        ),
        PYTHONWARNINGS='ignore',
        MPLBACKEND='agg',
    )
    output = ''
    for command in commands:
        process = subprocess.Popen(
            command.format(**words), shell=True, cwd=folder, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            shown, errors = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            return Outcome(1, output, f'takes more than {PATIENCE} s')
        finally:  # also if this command is stopped
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        output += shown + errors
        with (folder / 'output.txt').open('a') as file:
            file.write(f'$ {command}\n{shown}{errors}')
        if process.returncode:
            return Outcome(process.returncode, output, errors)
    return Outcome(0, output, '')


def try_part(part: Part, source: str, out: Path) -> Row:
    """Try one part in a folder of its own below ``out``."""
    began = time.monotonic()
    row = Row(part.name, source)
    folder = out / re.sub(r'\W+', '-', part.name)
    if part.shared:
        folder = out / f'{SHARED}-{part.data}'
    else:
        shutil.rmtree(folder, ignore_errors=True)
    write_project(folder, part)
    outcome = Outcome(0, '', '')
    if part.shared and not (folder / 'run' / 'slim.pth').is_file():
        outcome = run_commands([TRAIN], folder)
    if not outcome.status:
        outcome = run_commands(list(part.commands), folder)
    if outcome.status:
        row.verdict, row.reason = judge(part, outcome, folder)
    else:
        row.reason = find_fault(part, outcome, folder)
        row.verdict = 'fails' if row.reason else 'works'
    row.expected = is_expected(part, row.verdict, outcome.message)
    if row.verdict == part.expect and row.expected and part.why:
        row.reason = part.why
    row.seconds = time.monotonic() - began
    return row


def is_expected(part: Part, verdict: str, message: str) -> bool:
    """Whether a verdict is what the table of parts says.

    A part that needs a package may work: the package may be there.
    """
    if verdict == 'works':
        return part.expect in ('works', 'needs')
    return verdict == part.expect and bool(re.search(part.because, message))


def find_fault(part: Part, outcome: Outcome, folder: Path) -> str:
    """What is wrong although all commands succeeded; empty if nothing is."""
    if part.says and not re.search(part.says, outcome.output):
        return f'nothing that is printed matches {part.says!r}'
    if part.leaves and not any(folder.glob(part.leaves)):
        return f'no file {part.leaves}'
    return part.check(folder) if part.check else ''


def judge(part: Part, outcome: Outcome, folder: Path) -> tuple[str, str]:
    """Verdict and reason of a part whose commands failed.

    It is MMPretrain's own if the float network fails with the same message.
    """
    message = outcome.message[:WIDTH]
    if part.expect == 'needs' and re.search(part.because, outcome.message):
        return 'needs', part.why
    refuses = outcome.is_refusal
    if part.kind == 'tools':  # a script of MMPretrain asserts
        refuses |= message.startswith('AssertionError: ')
    if refuses and part.expect in ('refused', NOT_FOR):
        return part.expect, message
    if part.own:
        return 'fails', message
    alike = _comparable(fail_in_float(part, folder)) == _comparable(outcome)
    if alike:
        return NOT_FOR if part.expect == NOT_FOR else 'mmpretrain', message
    return 'fails', message


def fail_in_float(part: Part, folder: Path) -> Outcome:
    """Run the same commands with the float network."""
    commands = [
        command.replace('config.py', 'float.py')
        .replace('run/slim.pth', 'float_run/epoch_2.pth')
        .replace(' run', ' float_run')
        for command in part.commands
    ]
    if part.shared and not (folder / 'float_run').is_dir():
        train = TRAIN.replace('config.py', 'float.py')
        commands.insert(0, train.replace(' run', ' float_run'))
    return run_commands(commands, folder)


def _comparable(outcome: Outcome) -> str:
    text = outcome.message if outcome.status else ''
    for ours, theirs in (
        ('config.py', 'float.py'), ('JointQAT', 'ImageClassifier'),
        ('mmauxq.algorithms.joint_qat', 'mmpretrain.models.classifiers.image'),
        ('run/slim.pth', 'float_run/epoch_2.pth'),
    ):  # fmt: skip
        text = text.replace(ours, theirs)
    return text
