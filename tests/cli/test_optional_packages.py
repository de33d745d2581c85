"""No command needs a package that its install line does not bring.

Each program here runs in a process of its own in which some packages cannot
be imported, as on a machine that does not have them.
"""

import json
import shutil

import pytest

from mmauxq.optional import INSTALL
from tests.conftest import ROOT

RECIPE = ROOT / 'tests/installs/recipe.py'

# Nobody but an export, a comparison, the digits or a distillation needs these.
# MMEngine itself imports the two that are taken out.
OPTIONAL = sorted(
    {*INSTALL, 'mmrazor', 'onnx_ir', 'tensorboard'} - {'matplotlib', 'rich'}
)

BLOCK = """
import sys


class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] not in BLOCKED:
            return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""

RUNS = """
from mmauxq.cli import COMMANDS, run


def ends(status, name, *words):
    try:
        found = run(name, [str(word) for word in words])
    except SystemExit as leaves:  # argparse, after --help
        found = leaves.code
    assert found == status, (name, words, found)


for name in COMMANDS:
    ends(0, name, '--help')
ends(0, 'train', 'recipe.py', '--work-dir', 'run')
ends(0, 'test', 'recipe.py', 'run/slim.pth', '--out', 'metrics.json')
ends(0, 'audit', 'recipe.py', 'run/slim.pth', '--images', 8)
"""


def blocking(*packages) -> str:
    """A program that cannot import these, up to here."""
    return BLOCK.replace('BLOCKED', repr(set(packages)))


@pytest.mark.parametrize('blocked', [*OPTIONAL, 'all of them'])
def test_training_test_and_audit_need_no_optional_package(
    run_python, tmp_path, blocked
):
    packages = OPTIONAL if blocked == 'all of them' else [blocked]
    shutil.copy(RECIPE, tmp_path)
    (tmp_path / 'program.py').write_text(blocking(*packages) + RUNS)
    done = run_python('program.py')
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / 'run/slim.pth').is_file()
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert 0 <= metrics['accuracy/top1'] <= 100


@pytest.mark.parametrize(
    'command, words, package',
    [
        ('export', ['recipe.py', 'none.pth', '--out', 'out'], 'onnx'),
        ('export', ['recipe.py', 'none.pth', '--out', 'out'], 'safetensors'),
        ('audit', ['recipe.py', 'none.pth', '--onnx', 'recipe.py'], 'onnx'),
        ('latency', ['recipe.py'], 'onnxruntime'),
    ],
)
def test_a_missing_package_is_one_line(
    run_python, tmp_path, command, words, package
):
    shutil.copy(RECIPE, tmp_path)
    (tmp_path / 'program.py').write_text(
        f'{blocking(package)}\nfrom mmauxq.cli import run\n'
        f'sys.exit(run({command!r}, {words!r}))\n'
    )
    done = run_python('program.py')
    assert done.returncode == 2
    assert done.stderr == (
        f'error: this needs the package {package}, which is not installed: '
        'pip install "mmauxq[export]"\n'
    )


def test_the_blocker_blocks(run_python, tmp_path):
    (tmp_path / 'program.py').write_text(
        blocking('onnx') + 'import onnx.helper\n'
    )
    done = run_python('program.py')
    assert "ModuleNotFoundError: No module named 'onnx'" in done.stderr
