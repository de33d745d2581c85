"""What the package holds, and where MMEngine finds it.

Whether it installs and runs is tried by ``tests/installs``.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from mmauxq import __version__
from mmauxq.optional import INSTALL


def run(*command, cwd):
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope='session')
def source(root, tmp_path_factory) -> Path:
    """A clean copy of the repository: what git tracks or would track."""
    target = tmp_path_factory.mktemp('source') / 'mmauxq'
    shutil.copytree(
        root,
        target,
        symlinks=True,
        ignore=shutil.ignore_patterns(
            '.git', '.venv', 'build', 'dist', '*.egg-info', '__pycache__',
            'work_dirs', 'data', '.*_cache', '.hypothesis',
        ),
    )  # fmt: skip
    return target


def build(name: str, source: Path, out: Path) -> Path:
    """What setuptools builds of the source; needs no other package."""
    code = f'from setuptools import build_meta as b; b.{name}({str(out)!r})'
    run(sys.executable, '-c', code, cwd=source)
    return next(out.glob('mmauxq-*.whl'))


def test_the_wheel(source, tmp_path, root):
    wheel = build('build_wheel', source, tmp_path)
    assert wheel.name.startswith(f'mmauxq-{__version__}-')
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        points = next(n for n in names if n.endswith('/entry_points.txt'))
        assert 'mmauxq = mmauxq.__main__:command' in str(file.read(points))
        # a link would be stored as a file that holds a path
        mim = 'mmauxq/.mim'
        for name in (
            'model-index.yml', 'configs/metafile.yml', 'tools/train.py',
            'tools/test.py', 'tools/dist_train.sh',
            'configs/checkpoints/float_r8_digits.pth',
            'configs/checkpoints/aux_r8_w2a2_digits.pth',
        ):  # fmt: skip
            assert file.read(f'{mim}/{name}') == (root / name).read_bytes()
    configs = (root / 'configs').rglob('*.py')
    assert {f'{mim}/{c.relative_to(root)}' for c in configs} <= set(names)
    folders = {name.split('/')[0] for name in names}
    assert folders == {'mmauxq', f'mmauxq-{__version__}.dist-info'}


def test_an_editable_install_finds_the_configs(source, tmp_path):
    """Where MMEngine's own look-up would name a folder that is not there."""
    wheel = build('build_editable', source, tmp_path)
    venv.create(tmp_path / 'env', with_pip=False, symlinks=True)
    python = tmp_path / 'env/bin/python'
    where = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    site = Path(run(python, '-c', where, cwd=tmp_path).strip())
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    # everything else comes from the environment of the tests
    heavy = sysconfig.get_path('purelib')
    (site / 'heavy.pth').write_text(f'{heavy}\n')
    (tmp_path / 'probe.py').write_text(
        'import mmauxq\n'
        'from mmengine.config import Config\n'
        'open("recipe.py", "w").write('
        '"_base_ = \'mmauxq::_base_/aux_w4a4.py\'")\n'
        'print(mmauxq.__file__)\n'
        'print(Config.fromfile("recipe.py").quantization.type)\n'
    )
    file, found = run(python, 'probe.py', cwd=tmp_path).split()
    assert file == str(source / 'mmauxq/__init__.py')
    assert found == 'mmauxq.JointQAT'


def test_links_are_relative_and_committed(root):
    for name in ('configs', 'tools', 'model-index.yml'):
        link = root / 'mmauxq/.mim' / name
        assert os.readlink(link) == f'../../{name}'
        assert link.exists()


def test_config_names_are_unique(root):
    """``mim`` looks configs up by their base name."""
    names = [f.name for f in (root / 'configs').rglob('*.py')]
    assert sorted(names) == sorted(set(names))


def test_what_is_asked_for_can_be_installed(root):
    """Each extra that a message names is one of setup.py's."""
    text = (root / 'setup.py').read_text()
    for word in INSTALL.values():
        for extra in re.findall(r'mmauxq\[(.+)\]', word):
            assert f"    '{extra}': " in text
