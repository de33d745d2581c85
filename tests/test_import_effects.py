"""Importing the package changes nothing in the process of somebody else."""

SCRIPT = """
import os, pickle
import torch, mmengine, mmpretrain.models, mmengine.optim
from mmengine.runner import Runner
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as C
from mmengine.fileio.backends import registry_utils as files
from mmengine.runner.checkpoint import CheckpointLoader

os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] = '1'

def state():
    return (
        dict(os.environ),
        C.get('DefaultOptimWrapperConstructor'),
        dict(files.backends), dict(files.prefix_to_backends),
        dict(CheckpointLoader._schemes),
        Runner.resume,
        torch.serialization.get_safe_globals(),
        torch.get_rng_state().tolist(),
    )

before = state()
import importlib, pkgutil, mmauxq
for module in pkgutil.walk_packages(mmauxq.__path__, 'mmauxq.'):
    if not module.name.endswith('__main__'):
        importlib.import_module(module.name)
after = state()
for a, b in zip(before, after):
    assert a == b, (a, b)

class Own:
    pass

torch.save(Own(), 'own.pth')
assert type(torch.load('own.pth', weights_only=False)).__name__ == 'Own'
print('same')
"""


def test_nothing_of_torch_or_mmengine_is_changed(run_python, tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    done = run_python('script.py')
    assert done.stdout.strip().endswith('same'), done.stderr
