"""SIGINT and SIGTERM in every command, at any moment; disks that are full.

The signals come from inside, at a chosen moment, so that nothing depends on
how fast the machine is.
"""

import pytest

from mmauxq.cli import COMMANDS
from tests.support.children import in_children
from tests.tools.conftest import CONFIG, DATASET

# The fixture takes as long. What is slow runs first, in one worker; two that
# share the last tests would each set it up, and more than once.
pytestmark = pytest.mark.slow

FIRST = f"""
import os, signal, sys
import mmpretrain.datasets, mmpretrain.models
import mmauxq.algorithms, mmauxq.deploy, mmauxq.engine.build_runner
import mmauxq.engine.resumable_loops as loops
from mmauxq import files
from mmauxq.cli import run

def kill(kind, pid=None):
    os.kill(pid or os.getpid(), kind)

def train(*options):
    with open('config.py', 'w') as file:
        file.write({CONFIG!r})
    with open('toyset.py', 'w') as file:
        file.write({DATASET!r})
    sys.path.insert(0, os.getcwd())
    words = ['config.py', '--work-dir', 'run']
    if options:
        words += ['--cfg-options', *options]
    raise SystemExit(run('train', words))
"""
WORDS = {
    'train': [],
    'test': ['x.pth'],
    'export': ['x.pth', '--out', 'out', '--images', '0'],
    'audit': ['x.pth'],
    'latency': [],
    'sensitivity': ['x.pth', '--out', 'out'],
    'compare': ['--out', 'out', '--arms'],
}
IN_CONFIG = """
with open('config.py', 'w') as file:
    file.write('__import__("os").kill(__import__("os").getpid(), {kind:d})')
words = {words!r}
at = len(words) if {name!r} == 'compare' else 0
config = 'a=config.py' if at else 'config.py'
raise SystemExit(run({name!r}, [*words[:at], config, *words[at:]]))
"""
STEP = """
before = loops.EpochLoop.run_iter
def run_iter(self, *args):
    before(self, *args)
    if self._iter == 1: kill({kind:d})
loops.EpochLoop.run_iter = run_iter
train()
"""
VALIDATION = """
from mmengine.runner import ValLoop
def run_iter(self, *args): kill({kind:d})
ValLoop.run_iter = run_iter
train()
"""
WRITE = """
class Os:
    def __getattr__(self, name): return getattr(os, name)
    def fsync(self, number): kill({kind:d})
files.os = Os()
train()
"""
# A terminal sends it to all of its processes.
LOADER = """
import time
def get(self, index):
    kill({kind:d}, os.getppid())
    kill({kind:d})
    time.sleep(600)
from mmengine.runner import Runner
build = Runner.build_dataloader
def build_dataloader(*args, **options):
    loader = build(*args, **options)
    type(loader.dataset).__getitem__ = get
    return loader
Runner.build_dataloader = staticmethod(build_dataloader)
import mmauxq.engine.hooks as hooks
hooks.DataCheckHook.before_train = lambda self, runner: None
import multiprocessing
try:
    train('train_dataloader.num_workers=2')
finally:
    print('left', multiprocessing.active_children())
"""
SET_UP = """
from mmengine.runner import Runner
def build(*args, **options): kill({kind:d})
Runner.build_dataloader = staticmethod(build)
train()
"""
MOMENTS = dict(
    set_up=SET_UP, step=STEP, validation=VALIDATION, write=WRITE, loader=LOADER
)
KINDS = dict(SIGINT=2, SIGTERM=15)
HINTS = dict(
    train='; go on with --resume',
    export='; the same command begins anew',
    sensitivity='; the same command begins anew',
    compare='; the same command goes on from here',
)
# Files of this size at most: what a disk says that is full.
FULL = """
import resource
sys.stdout = open(os.devnull, 'w')
resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes}))
train(*{options})
"""
LONG = ['train_cfg.max_epochs=200', 'train_cfg.val_interval=200']
DISKS = {
    'checkpoint': FULL.format(bytes=300_000, options=[]),
    'log': FULL.format(
        bytes=20_000,
        options=[*LONG, 'default_hooks.checkpoint.interval=200'],
    ),
    'config': FULL.format(bytes=1500, options=[]),
}


@pytest.fixture(scope='module')
def ended(tmp_path_factory):
    """Name -> how it ended."""
    programs = dict(DISKS)
    for kind, number in KINDS.items():
        for name in COMMANDS:
            programs[f'{name} {kind}'] = IN_CONFIG.format(
                kind=number, name=name, words=WORDS[name]
            )
        for name, program in MOMENTS.items():
            programs[f'{name} {kind}'] = program.format(kind=number)
    folder = tmp_path_factory.mktemp('stopped')
    return folder, in_children(folder, FIRST, programs)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', COMMANDS)
def test_commands(ended, name, kind):
    done = ended[1][f'{name} {kind}']
    assert done.stderr == f'stopped by {kind}{HINTS.get(name, "")}\n'
    assert done.returncode == 128 + KINDS[kind]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', MOMENTS)
def test_moments_of_a_training(ended, name, kind):
    folder, results = ended
    done = results[f'{name} {kind}']
    assert done.stderr == f'stopped by {kind}; go on with --resume\n'
    assert done.returncode == 128 + KINDS[kind]
    run = folder / f'{name} {kind}' / 'run'
    saved = ['epoch_1.pth'] if name == 'validation' else []
    assert [file.name for file in run.glob('*.pth')] == saved
    if name == 'loader':
        assert done.stdout.endswith('left []\n')
    if name == 'set_up':  # MMEngine's lines would hide ours
        assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize('name', DISKS)
def test_a_full_disk_is_one_line(ended, name):
    folder, results = ended
    done = results[name]
    assert done.stderr.startswith('error: ')
    assert done.stderr.endswith(
        'cannot be written: File too large; files that were complete before '
        'are unchanged\n'
    )
    assert done.stderr.count('\n') == 1
    assert done.returncode == 1
    assert not list((folder / name / 'run').glob('*.pth*'))
