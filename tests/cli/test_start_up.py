"""What the commands import, and when.

Modules are counted, not seconds: these do not depend on the machine.
"""

import pytest

from mmauxq.cli import COMMANDS

HEAVY = {
    'matplotlib',
    'mmcv',
    'mmpretrain',
    'mmrazor',
    'onnx',
    'scipy',
    'sklearn',
    'torch',
    'torchvision',
}
LOADED = """
import sys
{program}
print('LOADED', *sorted({{name.partition('.')[0] for name in sys.modules}}))
print('OURS', *[n for n in sys.modules if n.partition('.')[0] == 'mmauxq'])
"""


def loaded(run_python, program: str) -> tuple[set[str], set[str]]:
    """Top-level packages, and modules of ours, after a program has run."""
    done = run_python('-c', LOADED.format(program=program))
    assert done.returncode == 0, done.stderr
    lines = {
        words[0]: set(words[1:])
        for words in map(str.split, done.stdout.splitlines())
        if words and words[0] in ('LOADED', 'OURS')
    }
    return lines['LOADED'], lines['OURS']


def test_importing_the_package_is_light(run_python):
    packages, ours = loaded(run_python, 'import mmauxq')
    assert not packages & HEAVY
    assert ours <= {
        'mmauxq',
        'mmauxq.checkpoint_file',
        'mmauxq.compat',
        'mmauxq.errors',
        'mmauxq.files',
        'mmauxq.version',
    }


@pytest.mark.parametrize('command', COMMANDS)
def test_help_is_light(run_python, command):
    packages, _ = loaded(
        run_python,
        'from mmauxq.cli import run\n'
        f'try: run({command!r}, ["--help"])\n'
        'except SystemExit as leaves: assert leaves.code == 0',
    )
    assert not packages & HEAVY


@pytest.mark.parametrize('words', ['[]', '["--help"]', '["--version"]'])
def test_the_list_of_commands_is_light(run_python, words):
    packages, _ = loaded(
        run_python, f'from mmauxq.cli import main\nassert main({words}) == 0'
    )
    assert not packages & HEAVY


def test_a_training_imports_no_more_than_it_uses(run_python):
    """MMRazor's predictors would bring SciPy and scikit-learn for nothing."""
    packages, ours = loaded(
        run_python,
        'import mmauxq.algorithms, mmauxq.engine.build_runner\n'
        'import mmauxq.engine.resumable_loops, mmauxq.engine.optimizers\n'
        'import mmauxq.deploy',
    )
    # what MMEngine tries to import differs from machine to machine
    theirs, _ = loaded(
        run_python, 'import mmengine.runner, mmpretrain.datasets\n'
        'import mmpretrain.models',
    )  # fmt: skip
    assert {'torch', 'mmpretrain'} <= packages
    assert not (packages - theirs) & HEAVY
    later = ('mmauxq.compare', 'mmauxq.deploy.onnx', 'mmauxq.evaluation')
    assert not [name for name in ours if name.startswith(later)]
