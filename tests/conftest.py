"""Shared by all tests."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# How long an example takes depends on what else the machine does.
settings.register_profile(
    'any machine', deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile('any machine')

# Kernels run on the GPU where there is one, else in Triton's interpreter.
# Read when Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

ROOT = Path(__file__).resolve().parents[1]


def process_environment(path=ROOT, more=None):
    """Environment of a fresh process that imports what lies at ``path``."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', **(more or {})}
    for name in list(environment):  # set by mmauxq.compat in this process
        if name.endswith('WEIGHTS_ONLY_LOAD'):
            del environment[name]
    if path:  # beside what was on the path already
        before = environment.get('PYTHONPATH', '')
        environment['PYTHONPATH'] = os.pathsep.join(
            filter(None, [str(path), before])
        )
    else:
        environment['PYTHONPATH'] = ''
    return environment


@pytest.fixture(scope='session')
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope='session', autouse=True)
def configs_are_worked_on_once():
    """Does not change what MMEngine computes, only how often.

    For each inherited file it reads all 85 metafiles of MMPretrain and the
    list of installed packages; in each training it formats the same config
    five times.
    """
    from mmengine.config import config, utils

    format_code, formatted = config.FormatCode, {}

    def format_once(text, style_config):
        if text not in formatted:
            formatted[text] = format_code(text, style_config=style_config)
        return formatted[text]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, 'FormatCode', format_once)
        patch.setattr(utils, 'load', functools.cache(utils.load))
        patch.setattr(
            config, 'is_installed', functools.cache(config.is_installed)
        )
        yield


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Each test draws the same, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Or the ninth model of a process that compiles one stays eager.

    torch counts compilations of a function over all models that have it.
    """
    yield
    if 'torch._dynamo' in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def run_python(tmp_path):
    """Run Python in a fresh process; returns the finished process.

    The repository is importable, the current directory is empty.
    """

    def run(*args, cwd=tmp_path, env=None, python=sys.executable, path=ROOT):
        environment = process_environment(path, env)
        return subprocess.run(
            [str(python), *map(str, args)],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1200,
        )

    return run


def pytest_collection_modifyitems(items):
    """Tests that fork come first: no child can use an initialised GPU. Then
    those that take long: no worker waits at the end for one of another."""
    items.sort(
        key=lambda item: (
            'test_resume' not in item.nodeid,
            item.get_closest_marker('slow') is None,
        )
    )
