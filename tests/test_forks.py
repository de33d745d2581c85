"""The maintained forks under the same import names, in their own environment.

The whole suite runs there as well (README); this is the short form that runs
everywhere.
"""

import os
import shutil
import subprocess
import sys

import pytest

INSTALL = """
set -e
uv venv -q --python {python} env
. env/bin/activate
uv pip install -q torch==2.11.0 torchvision==0.26.0 -e '{root}[onedl]'
uv pip install -q --no-deps mmcv-lite==2.1.0
"""

SCRIPT = """
import os

def say(*words):
    print('>', *words)

from importlib.metadata import version
say(version('onedl-mmengine'), version('onedl-mmpretrain'))

import torch
from mmengine.runner.checkpoint import CheckpointLoader, _safe_torch_load

class Evil:
    def __reduce__(self):
        return os.mkdir, ('ran',)

class Getattr:
    def __reduce__(self):
        return getattr, (torch.Size, 'numel')

torch.save(Evil(), 'evil.pth')
torch.save(Getattr(), 'getattr.pth')
_safe_torch_load('getattr.pth')
_safe_torch_load('evil.pth')
say('the fork alone ran it:', os.path.isdir('ran'))
os.rmdir('ran')

from mmauxq import compat
from mmauxq.errors import UsageError
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
compat.enable()
for name in ('evil.pth', 'getattr.pth'):
    for load in (_safe_torch_load, CheckpointLoader.load_checkpoint):
        try:
            load(name)
        except Exception as error:
            say(name, load.__name__, 'refused:', type(error).__name__)
say('ran:', os.path.isdir('ran'))
torch.save({'log': HistoryBuffer([1.0, 3.0], [1, 1])}, 'good.pth')
for load in (_safe_torch_load, CheckpointLoader.load_checkpoint):
    say(load('good.pth')['log'].mean())

with open('recipe.py', 'w') as file:
    file.write(
        "_base_ = ['mmpretrain::resnet/resnet18_8xb32_in1k.py',\\n"
        "          'mmauxq::_base_/aux_w4a4.py']\\n"
        "model = dict(_delete_=True, architecture=_base_.model,\\n"
        "             **_base_.quantization)\\n")
say(Config.fromfile('recipe.py').model.type)
"""


@pytest.mark.slow
def test_onedl_row(root, tmp_path):
    if not shutil.which('uv'):
        pytest.skip('needs uv, to build an environment quickly')
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ('PYTHONPATH', 'VIRTUAL_ENV')
        and not k.endswith('WEIGHTS_ONLY_LOAD')
    }
    # A copy, so that no egg-info is written into the repository.
    source = tmp_path / 'source'
    shutil.copytree(
        root,
        source,
        symlinks=True,
        ignore=shutil.ignore_patterns('.git', '.venv', 'work_dirs', 'data'),
    )

    def run(*command):
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    python = os.path.realpath(sys.executable)
    done = run('bash', '-c', INSTALL.format(python=python, root=source))
    if done.returncode:
        pytest.skip(f'environment cannot be built here: {done.stderr[-300:]}')
    (tmp_path / 'script.py').write_text(SCRIPT)
    done = run('env/bin/python', 'script.py')
    lines = [line[2:] for line in done.stdout.splitlines() if line[:2] == '> ']
    assert lines[0] == '0.10.12 1.3.6', done.stderr
    assert lines[1] == 'the fork alone ran it: True', (
        'the fork is safe now: shorten compat.enable_safe_checkpoints'
    )
    refused = [line for line in lines if 'refused:' in line]
    assert len(refused) == 4, done.stderr
    assert lines[-4:] == ['ran: False', '2.0', '2.0', 'mmauxq.JointQAT']
