"""Wheel, editable install, ``mim``, and a project that only inherits.

The environments made here see the heavy packages of this one through a
``.pth`` file; mmauxq itself comes from the wheel (or the editable install).
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

# Contract 1: the third line is the recipe; the rest is this project's data.
RECIPE = """
_base_ = [
    'mmpretrain::_base_/models/resnet18_cifar.py',
    'mmauxq::_base_/aux_w2a2.py',
]
_base_.model.backbone.in_channels = 1
model = dict(_delete_=True, architecture=_base_.model, input_shape=(1, 8, 8),
             **_base_.quantization)

default_scope = 'mmpretrain'
data_preprocessor = dict(num_classes=10, mean=[77.84], std=[95.89])
train_dataloader = dict(
    batch_size=64, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='mmauxq.Digits', split='train',
                 pipeline=[dict(type='PackInputs')]))
val_dataloader = dict(
    batch_size=64, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='mmauxq.Digits', split='test',
                 pipeline=[dict(type='PackInputs')]))
val_evaluator = dict(type='Accuracy', topk=(1, ))
train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
val_cfg = dict()
test_dataloader, test_evaluator = val_dataloader, val_evaluator
test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4))
"""


def run(*command, cwd, **env):
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    environment.update(OMP_NUM_THREADS='1', **env)
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def make_environment(path: Path) -> Path:
    """An environment without mmauxq; returns its Python."""
    venv.create(path, with_pip=False, symlinks=True)
    python = path / 'bin/python'
    folder = run(
        python,
        '-c',
        'import sysconfig; print(sysconfig.get_path("purelib"))',
        cwd=path,
    ).strip()
    Path(folder, 'heavy.pth').write_text(sysconfig.get_path('purelib') + '\n')
    return python


def install(python: Path, *args) -> None:
    """Install with the pip or uv that is there, from this machine only."""
    if shutil.which('uv'):
        command = ['uv', 'pip', 'install', '-q', '--python', python]
    else:
        target = python.parents[1]
        command = [sys.executable, '-m', 'pip', f'--python={target}',
                   'install', '-q']  # fmt: skip
    run(*command, '--no-deps', *args, cwd=python.parent)


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
            'work_dirs', 'data', '.*_cache', '.hypothesis', '*.pth',
        ),
    )  # fmt: skip
    return target


@pytest.fixture(scope='session')
def wheel(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('wheel')
    run(
        sys.executable, '-c',
        'import sys; from setuptools import build_meta as b; '
        f'print(b.build_wheel({str(out)!r}))',
        cwd=source,
    )  # fmt: skip
    return next(out.glob('mmauxq-*.whl'))


@pytest.fixture(scope='session')
def wheel_python(wheel, tmp_path_factory) -> Path:
    python = make_environment(tmp_path_factory.mktemp('env') / 'wheel')
    install(python, wheel)
    return python


def where(python, cwd) -> Path:
    code = 'import mmauxq, os; print(os.path.dirname(mmauxq.__file__))'
    return Path(run(python, '-c', code, cwd=cwd).strip())


def resolve(python, cwd) -> None:
    """A ``mmauxq::`` base is found."""
    (cwd / 'probe.py').write_text(
        'import mmauxq\n'
        'from mmengine.config import Config\n'
        'from mmengine.config.utils import _get_package_and_cfg_path as g\n'
        'from mmengine.config.utils import _get_external_cfg_base_path as b\n'
        'from mmengine.utils import get_installed_path\n'
        'package, path = g("mmauxq::metafile/../metafile.yml")\n'
        'print(b(get_installed_path(package), "metafile.yml"))\n'
    )
    assert Path(run(python, 'probe.py', cwd=cwd).strip()).is_file()


def test_wheel_holds_real_files(wheel_python, tmp_path, root):
    package = where(wheel_python, tmp_path)
    assert root not in package.parents
    mim = package / '.mim'
    assert not (mim / 'configs').is_symlink()
    for name in (
        'model-index.yml',
        'configs/metafile.yml',
        'tools/train.py',
        'tools/test.py',
        'tools/dist_train.sh',
    ):
        assert (mim / name).is_file(), name
    for file in (root / 'configs').rglob('*.py'):
        assert (mim / 'configs' / file.relative_to(root / 'configs')).is_file()
    assert not (package.parent / 'tests').exists()
    resolve(wheel_python, tmp_path)


def test_editable_install(source, tmp_path):
    python = make_environment(tmp_path / 'env')
    install(python, '--no-build-isolation', '-e', source)
    assert where(python, tmp_path) == source / 'mmauxq'
    resolve(python, tmp_path)


def test_links_are_relative_and_committed(root):
    for name in ('configs', 'tools', 'model-index.yml'):
        link = root / 'mmauxq/.mim' / name
        assert os.readlink(link) == f'../../{name}'
        assert link.exists()


def test_config_names_are_unique(root):
    """``mim`` looks configs up by their base name."""
    names = [f.name for f in (root / 'configs').rglob('*.py')]
    assert sorted(names) == sorted(set(names))


def test_version_is_one(root, wheel):
    from mmauxq import __version__

    assert wheel.name.startswith(f'mmauxq-{__version__}-')


@pytest.mark.slow
def test_mim_train(wheel_python, tmp_path):
    # --no-deps: openmim pins an old setuptools and rich.
    install(wheel_python, 'openmim==0.3.9', 'pip', 'click', 'colorama',
            'tabulate', 'pandas', 'requests', 'urllib3', 'idna', 'certifi',
            'charset-normalizer', 'pytz')  # fmt: skip
    out = run(
        wheel_python.parent / 'mim', 'train', 'mmauxq', '--help',
        cwd=tmp_path,
    )  # fmt: skip
    assert 'Usage' in out
    (tmp_path / 'recipe.py').write_text(RECIPE)
    run(
        wheel_python.parent / 'mim', 'train', 'mmauxq', 'recipe.py',
        '--launcher', 'none', '--work-dir', 'run',
        '--cfg-options', 'train_cfg.max_epochs=1',
        cwd=tmp_path, PATH=f'{wheel_python.parent}:{os.environ["PATH"]}',
    )  # fmt: skip
    assert (tmp_path / 'run/epoch_1.pth').is_file()


@pytest.mark.slow
def test_downstream_project_trains(wheel_python, tmp_path):
    """Contract 1, from a folder outside the repository."""
    (tmp_path / 'recipe.py').write_text(RECIPE)
    package = where(wheel_python, tmp_path)
    run(
        wheel_python, package / '.mim/tools/train.py', 'recipe.py',
        '--work-dir', 'run', cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / 'run/epoch_1.pth').is_file()
