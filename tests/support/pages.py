"""The blocks of a page of the documentation, run as a reader types them."""

import importlib
import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmauxq.cli import main
from tests.conftest import process_environment

BLOCK = re.compile(
    r'(?:^<!-- not run: (?P<reason>[^\n]+) -->\n\n?)?'
    r'^```(?P<kind>\w*)\n(?P<text>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
SHORTER = {
    # two digits: those of the tutorial
    r'^epochs = \d\d$': 'epochs = 2',
    r'\bepoch_\d\d\.pth\b': 'epoch_2.pth',
    # one seed has no spread
    r'--seeds 0 1 2$': '--seeds 0',
    r'randperm\(1500\)': 'randperm(100)',
    r' ± [\d.]+| \[[^]]*\](?=, \d+ of)': '',
}
"""What a page says -> what a test of it says: the same in less time."""
FIRST = (
    'matplotlib.pyplot',
    'mmauxq.api',
    'mmauxq.deploy.onnx.export',
    'mmauxq.engine.build_runner',
    'mmpretrain.datasets',
    'mmpretrain.engine',
    'onnxscript',
    'sklearn.datasets',
    'torch.export',
)
"""What is imported once, and not in each fork."""
COMMANDS = re.compile(
    r'(?:^(?:python -m )?mmauxq (?:[^$|*>&;\\\n]|\\\n)+\n)+\Z', re.MULTILINE
)
"""Lines at the end of a block that need no shell; each runs in a fork of this
process, which has imported already what takes longer than the page."""
KEPT = re.compile(r'^\s*(cd|export|source|\.)\s', re.MULTILINE)
"""What a shell remembers for the next line."""
NUMBER = re.compile(r'(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)')
HANGS = 600
"""Seconds after which a block is taken to hang, on however slow a machine."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        kind: ``bash``, ``python``, or ``text``, which is what the block
            before it prints.
        text: What is between the fences.
        reason: Why tests do not run it, if they do not.
        line: Where it begins in its page.
    """

    kind: str
    text: str
    reason: str | None
    line: int


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in its order, made shorter for a test."""
    return [
        Block(
            found['kind'],
            _shorter(found['text']),
            found['reason'],
            page.count('\n', 0, found.start('kind')) + 1,
        )
        for found in BLOCK.finditer(page)
    ]


def _shorter(text: str) -> str:
    for long, short in SHORTER.items():
        text = re.sub(long, short, text, flags=re.MULTILINE)
    return text


def run(block: Block, folder: Path) -> str:
    """Run a block in ``folder``; returns what it printed.

    Raises:
        AssertionError: If it fails; with what it printed.
    """
    if block.kind == 'python':
        program = folder / 'block.py'
        program.write_text(block.text)
        status, printed = _forked(lambda: _program(program), folder)
        program.unlink()
    else:
        status, printed = _typed(block.text, folder)
    assert status == 0, f'{printed}\n\nline {block.line}: status {status}'
    return printed


def _typed(text: str, folder: Path) -> tuple[int, str]:
    """Status and output of lines typed into bash."""
    found = COMMANDS.search(text)
    if found is None or KEPT.search(text[: found.start()]):
        return _in_bash(text, folder)
    status, printed = _in_bash(text[: found.start()], folder)
    for line in re.sub(r'\\\n\s*', '', found[0]).splitlines():
        if status:
            break
        before, words = line.split('mmauxq ', 1)
        path = [str(folder)] if before else []
        status, output = _forked(_command(shlex.split(words), path), folder)
        printed += output
    return status, printed


def _in_bash(text: str, folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        ['bash', '-euo', 'pipefail', '-c', text],
        env=_environment(), cwd=folder, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=HANGS,
    )  # fmt: skip
    return done.returncode, done.stdout


def _environment() -> dict[str, str]:
    """Where ``mmauxq`` and ``python`` are those of the tests."""
    environment = process_environment()
    beside = Path(sys.executable).parent
    environment['PATH'] = f'{beside}{os.pathsep}{environment["PATH"]}'
    return environment


def _command(words: list[str], path: list[str]) -> Callable[[], int | None]:
    def run_command() -> int | None:
        sys.path[:0] = path
        return main(words)

    return run_command


def _program(file: Path) -> None:
    sys.path.insert(0, str(file.parent))
    runpy.run_path(str(file), run_name='__main__')


def _forked(work: Callable[[], int | None], folder: Path) -> tuple[int, str]:
    """Status and output of ``work`` in a fork of this process."""
    for name in FIRST:
        importlib.import_module(name)
    output = folder.parent / 'output.txt'
    process = multiprocessing.get_context('fork').Process(
        target=_in_fork, args=(work, folder, output)
    )
    process.start()
    process.join(HANGS)
    assert process.exitcode is not None, output.read_text()
    return process.exitcode, output.read_text()


def _in_fork(work: Callable, folder: Path, output: Path) -> None:
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, 'w', buffering=1, closefd=False)
    sys.stderr = open(2, 'w', buffering=1, closefd=False)
    environment = _environment()
    os.environ.clear()
    os.environ.update(environment)
    warnings.resetwarnings()  # those of pytest are errors
    sys.exit(work())


def check_shown(shown: str, printed: str) -> None:
    """Compare the output that a page shows with what was printed.

    Each line of the page must be in a printed one, in this order. Any number
    stands for any number, and ``...`` for anything.

    Raises:
        AssertionError: With the first line that is not there.
    """
    rest = iter(printed.splitlines())
    for line in filter(None, map(str.strip, shown.splitlines())):
        pattern = re.compile(_pattern(line))
        assert any(pattern.search(other) for other in rest), (
            f'{printed[-5000:]}\n\nnot printed, or not there: {line}'
        )


def _pattern(line: str) -> str:
    parts = [
        r'\s+'.join(map(_numbers, part.split())) for part in line.split('...')
    ]
    return '.*'.join(parts)


def _numbers(word: str) -> str:
    return NUMBER.pattern.join(map(re.escape, NUMBER.split(word)))
