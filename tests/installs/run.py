"""Try the install lines of README.md, each in an environment of its own.

    python3 tests/installs/run.py                  # all
    python3 tests/installs/run.py onedl openmim    # those with these words
    python3 tests/installs/run.py --list

Each indented block of README's section "Install" is typed as it stands, by
this Python's own pip, in a fresh clone of what is committed and a fresh
environment. Then, from a folder outside of the clone, a recipe is trained,
tested and audited. Blocks that add to an installation (`pip install
"mmauxq[...]"`) are what a command asks for that lacks something; they are
tried on top of the first and the last of the others. The first line of "Two
commands", the quick start, has a clone and the machine to itself; after that
there are two environments at a time, because pip uses one core.

Needs Python with venv, git, a package index and 12 GB; nothing stays.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMMANDS = (
    'train', 'test', 'export', 'audit', 'latency', 'sensitivity', 'compare',
)  # fmt: skip
PACKAGES = ('torch', 'torchvision', 'mmengine', 'mmpretrain')
ADDS = 'pip install "mmauxq['
HANGS = 3600
"""Seconds after which a step is taken to hang, on however slow a machine."""


class Failed(Exception):
    """A step did not do what it should."""


@dataclass
class Place:
    """A clone, an environment and a folder outside of both."""

    number: int
    folder: Path

    def __post_init__(self) -> None:
        self.clone = self.folder / 'clone'
        self.outside = self.folder / 'outside'
        self.log = self.folder / 'log'
        self.outside.mkdir()
        # What says how the network is reached stays; what adds modules
        # would hide those that are missing.
        self.variables = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(('PYTHON', 'VIRTUAL_ENV'))
        }
        self.variables.update(PYTHON=sys.executable, OMP_NUM_THREADS='1')

    def type(
        self,
        line: str,
        where: Path | None = None,
        status: int = 0,
        expected: str = '',
    ) -> str:
        """Run a line in bash; returns what it printed.

        Raises:
            Failed: If it ends with another status, or prints something else.
        """
        begin = time.monotonic()
        done = subprocess.run(
            ['bash', '-euo', 'pipefail', '-c', line],
            cwd=where or self.outside,
            env=self.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=HANGS,
        )
        with self.log.open('a') as log:
            log.write(f'$ {line}\n{done.stdout}')
        self.say(f'$ {line} ({time.monotonic() - begin:.0f} s)')
        if done.returncode != status:
            raise Failed(
                f'exit status {done.returncode} instead of {status}: {line}'
            )
        if expected not in done.stdout:
            raise Failed(f'no {expected!r} in what this printed: {line}')
        return done.stdout

    def say(self, text: str) -> None:
        """Print lines in one go: another place prints at the same time."""
        print(f'[{self.number}] {text}\n', end='', flush=True)

    def python(self, code: str) -> str:
        """Run Python in the environment, outside of the clone."""
        return subprocess.check_output(
            ['python', '-c', code],
            cwd=self.outside,
            env=self.variables,
            text=True,
        ).strip()

    def clone_repository(self) -> None:
        """What is committed, and nothing else."""
        subprocess.run(
            ['git', 'clone', '-q', ROOT.as_uri(), self.clone], check=True
        )

    def make_environment(self) -> None:
        """Python and pip, as they come, and nothing else."""
        environment = self.folder / 'environment'
        subprocess.run([sys.executable, '-m', 'venv', environment], check=True)
        self.variables['VIRTUAL_ENV'] = str(environment)
        path = self.variables['PATH']
        self.variables['PATH'] = f'{environment}/bin:{path}'


@dataclass
class Row:
    """A line of the table at the end."""

    name: str
    versions: str = ''
    installed: float = 0
    tried: float = 0
    trouble: str = ''

    def __str__(self) -> str:
        return (
            f'| {self.name} | {self.versions} | {self.installed:.0f} s | '
            f'{self.tried:.0f} s | {self.trouble or "passed"} |'
        )


def blocks(text: str, heading: str) -> list[list[str]]:
    """The lines of each indented block under a heading."""
    section = text.split(f'\n## {heading}\n')[1].split('\n## ')[0]
    found = re.findall(r'(?:^    .+\n)+', section, flags=re.MULTILINE)
    return [
        [re.sub(r'\s+# .*', '', line).strip() for line in block.splitlines()]
        for block in found
    ]


def try_commands(place: Place, lines: list[str]) -> None:
    """Use what was installed, from the outside."""
    shutil.copy(HERE / 'recipe.py', place.outside)
    for name in ('', *COMMANDS):
        place.type(f'mmauxq {name} --help', expected='usage: mmauxq')
    mim = any('openmim' in line for line in lines)
    train = 'mim train mmauxq' if mim else 'mmauxq train'
    place.type(f'{train} recipe.py --work-dir run')
    place.type(
        'mmauxq test recipe.py run/slim.pth | tail -n 1',
        expected='{"accuracy/top1": ',
    )
    place.type('mmauxq audit recipe.py run/slim.pth --images 64')
    if any('onedl' in line for line in lines):
        place.type(f'python {HERE / "forks.py"}')


def try_additions(place: Place, additions: list[str]) -> None:
    """Commands that lack something name the line that adds it."""
    lines = [
        'mmauxq export recipe.py run/slim.pth --out ship --images 64',
        'mmauxq compare --arms aux=recipe.py --seeds 0 --out compared',
    ]
    if sys.version_info >= (3, 11):
        lines.append(f'{lines[0]} --format qonnx')
    phone = lines[0].replace('--out ship', '--out phone')
    lines.append(f'{phone} --format tflite')
    for line in lines:
        said = place.type(line, status=2)
        addition = ''.join(said.rpartition('pip install')[1:]).strip()
        if addition not in additions:
            raise Failed(f'README has no line {addition!r}: {said}')
        place.type(addition)
        place.type(line)
    place.type(
        'mmauxq audit recipe.py run/slim.pth --images 64 '
        '--onnx ship/model.onnx'
    )


def try_tests(place: Place) -> None:
    """Those of what needs packages that the tests are not installed with,
    because MMPretrain imports Transformers wherever it is."""
    place.type('pip install pytest hypothesis')
    place.type(
        # this plugin of a package that litert-torch brings is behind pytest
        'python -m pytest -q -p no:anyio -p no:cacheprovider '
        'tests/deploy/tflite',
        ROOT,
        expected='passed in',
    )


def try_program(place: Place) -> None:
    """The program of from_python.md, with what that page asks for."""
    place.type('pip install "mmauxq[digits]"')
    page = (ROOT / 'docs/how_to/from_python.md').read_text()
    block = re.search(r'^```python\n(.+?)^```$', page, flags=re.M | re.S)
    (place.outside / 'program.py').write_text(block[1])
    place.type('python program.py', expected='correct: ')


def versions(place: Place) -> str:
    """Of what matters; the forks have other names."""
    found = place.python(
        'from importlib.metadata import distributions\n'
        'print(*{f"{d.name} {d.version}" for d in distributions()}, sep="\\n")'
    )
    return ', '.join(
        f'{name.removeprefix("onedl-")} {version}'
        for name, version in sorted(map(str.split, found.splitlines()))
        if name.removeprefix('onedl-') in PACKAGES
    )


def try_block(number: int, lines: list[str], additions: list[str]) -> Row:
    """Type an installation, and use it."""
    with tempfile.TemporaryDirectory(prefix='mmauxq-install-') as folder:
        return try_in(Place(number, Path(folder)), lines, additions)


def try_in(place: Place, lines: list[str], additions: list[str]) -> Row:
    row = Row(' && '.join(lines))
    place.say(row.name)
    begin = time.monotonic()
    try:
        place.clone_repository()
        if any(line.startswith('bash ') for line in lines):
            place.type(lines[0], place.clone)
        else:
            place.make_environment()
            for line in lines:
                place.type(line, place.clone)
            row.versions = versions(place)
            row.installed = time.monotonic() - begin
            shutil.rmtree(place.clone)
            try_commands(place, lines)
            if additions:
                try_additions(place, additions)
                try_program(place)
                if any('constraints' in line for line in lines):
                    try_tests(place)
    except (Failed, subprocess.SubprocessError) as trouble:
        log = place.log.read_text() if place.log.is_file() else ''
        row.trouble = f'FAILED: {" ".join(str(trouble).split())[:300]}'
        place.say(f'{log}{row.trouble}')
    row.tried = time.monotonic() - begin - row.installed
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('words', nargs='*', help='try blocks with one of them')
    parser.add_argument('--list', action='store_true', help='try nothing')
    args = parser.parse_args()
    text = (ROOT / 'README.md').read_text()
    found = blocks(text, 'Install')
    added = sum((b for b in found if b[0].startswith(ADDS)), [])
    bases = [b for b in found if not b[0].startswith(ADDS)]
    start = [
        [b[0]]
        for b in blocks(text, 'Two commands')
        if b[0].startswith('bash ')
    ]
    chosen = [
        block
        for block in start + bases
        if not args.words or any(w in ' '.join(block) for w in args.words)
    ]
    if args.list:
        print('\n'.join(' && '.join(block) for block in chosen))
        return 0
    dirty = subprocess.check_output(
        ['git', 'status', '--porcelain'], cwd=ROOT, text=True
    )
    if dirty:
        print(f'Not committed, so not tried:\n{dirty}')
    numbered = list(enumerate(chosen, 1))
    with ThreadPoolExecutor(2) as pool:
        rows = [try_block(n, b, []) for n, b in numbered if b in start]
        rows += pool.map(
            lambda at: try_block(
                *at, added if at[1] in (bases[0], bases[-1]) else []
            ),
            [at for at in numbered if at[1] not in start],
        )
    print(
        f'\n| install line (Python {platform.python_version()}) | versions '
        '| installed in | tried in | verdict |\n|---|---|---|---|---|'
    )
    print(*rows, sep='\n')
    failed = sum(bool(row.trouble) for row in rows)
    print(f'{len(rows) - failed} passed, {failed} failed')
    return int(failed > 0 or not rows)


if __name__ == '__main__':
    sys.exit(main())
