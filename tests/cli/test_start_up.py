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


def loaded(run_python, *programs: str) -> tuple[set[str], set[str]]:
    """Top-level packages that the last program adds, and modules of ours."""
    code = ''.join(LOADED.format(program=program) for program in programs)
    done = run_python('-c', code)
    assert done.returncode == 0, done.stderr
    packages, ours = (
        [
            set(line.split()[1:])
            for line in done.stdout.splitlines()
            if line.startswith(word)
        ]
        for word in ('LOADED', 'OURS')
    )
    before = packages[-2] if len(programs) > 1 else set()
    return packages[-1] - before, ours[-1]


def test_importing_the_package_is_light(run_python):
    packages, ours = loaded(run_python, 'import mmauxq')
    assert not packages & HEAVY
    assert ours <= {
        'mmauxq',
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
        # what MMEngine tries to import differs from machine to machine
        'import mmengine.runner, mmpretrain.datasets, mmpretrain.models',
        'import mmauxq.algorithms, mmauxq.engine.build_runner\n'
        'import mmauxq.engine.resumable_loops, mmauxq.engine.optimizers\n'
        'import mmauxq.deploy',
    )
    assert 'mmauxq.algorithms' in ours
    assert not packages & HEAVY
    later = ('mmauxq.compare', 'mmauxq.deploy.onnx')
    assert not [name for name in ours if name.startswith(later)]
