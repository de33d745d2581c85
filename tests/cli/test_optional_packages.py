"""No command needs a package that its install line does not bring.

Each program here runs in a process of its own in which some packages cannot
be imported, as on a machine that does not have them.
"""

import json
import shutil

import pytest

from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.optional import INSTALL
from tests.conftest import ROOT
from tests.support.children import in_children

RECIPE = ROOT / 'tests/installs/recipe.py'

# Nobody but an export, a comparison, the digits or a distillation needs these.
# MMEngine itself imports the two that are taken out.
OPTIONAL = sorted(
    {*INSTALL, 'mmrazor', 'onnx_ir', 'tensorboard'} - {'matplotlib', 'rich'}
)

HIDE = """
import sys


class Hiding:
    def __init__(self, finder, names):
        self.finder, self.names = finder, names

    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] not in self.names:
            return self.finder.find_spec(name, path, target)


def hide(*names):
    # what another package imported for itself
    for name in [m for m in sys.modules if m.partition('.')[0] in names]:
        del sys.modules[name]
    sys.meta_path[:] = [Hiding(finder, names) for finder in sys.meta_path]


"""

RUNS = """
def runs():
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


def succeeded(folder) -> bool:
    """Whether a network was trained, made slim and tested."""
    metrics = json.loads((folder / 'metrics.json').read_text())
    slim = read_checkpoint(folder / 'run/slim.pth')
    return 0 <= metrics['accuracy/top1'] <= 100 and bool(slim['state_dict'])


def test_training_test_and_audit_need_no_optional_package(
    run_python, tmp_path
):
    shutil.copy(RECIPE, tmp_path)
    (tmp_path / 'program.py').write_text(
        f'{HIDE}hide(*{OPTIONAL})\n\n{RUNS}runs()\n'
    )
    done = run_python('program.py')
    assert done.returncode == 0, done.stderr[-3000:]
    assert succeeded(tmp_path)


@pytest.mark.slow
def test_they_need_none_that_another_would_stand_in_for(tmp_path):
    """Each is hidden alone, while the others are there.

    Nothing of this package is imported before.
    """
    found = in_children(
        tmp_path,
        f'{HIDE}{RUNS}import matplotlib.pyplot, mmengine.runner\n'
        'import mmpretrain.datasets, mmpretrain.engine, mmpretrain.models\n',
        {
            name: f'import shutil\nshutil.copy({str(RECIPE)!r}, ".")\n'
            f'hide({name!r})\nruns()\n'
            for name in OPTIONAL
        },
    )
    for name, done in found.items():
        assert done.returncode == 0, (name, done.stderr[-3000:])
        assert succeeded(tmp_path / name)


@pytest.mark.parametrize(
    'command, words, package',
    [
        ('export', ['recipe.py', 'none.pth', '--out', 'out'], 'onnx'),
        ('export', ['recipe.py', 'none.pth', '--out', 'out'], 'safetensors'),
        ('audit', ['recipe.py', 'none.pth', '--onnx', 'recipe.py'], 'onnx'),
        ('latency', ['recipe.py'], 'onnxruntime'),
        ('sensitivity', ['recipe.py', 'none.pth', '--out', 'out'], 'scipy'),
    ],
)
def test_a_missing_package_is_one_line(
    run_python, tmp_path, command, words, package
):
    shutil.copy(RECIPE, tmp_path)
    (tmp_path / 'program.py').write_text(
        f'{HIDE}hide({package!r})\nfrom mmauxq.cli import run\n'
        f'sys.exit(run({command!r}, {words!r}))\n'
    )
    done = run_python('program.py')
    assert done.returncode == 2
    assert done.stderr == (
        f'error: this needs the package {package}, which is not installed: '
        f'pip install {INSTALL[package]}\n'
    )


def test_what_is_hidden_cannot_be_imported(run_python, tmp_path):
    (tmp_path / 'program.py').write_text(
        f'{HIDE}hide("onnx")\nimport onnx.helper\n'
    )
    done = run_python('program.py')
    assert "ModuleNotFoundError: No module named 'onnx'" in done.stderr
