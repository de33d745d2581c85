"""What only the environment of the maintained forks can show.

onedl-mmengine answers a checkpoint that torch refuses by loading it unsafely,
so that its code runs; ``mmauxq.compat`` must keep it from that.
"""

import os
from importlib.metadata import distributions

import torch
from mmengine.runner.checkpoint import CheckpointLoader, _safe_torch_load

from mmauxq import compat


class Evil:
    def __reduce__(self):
        return os.mkdir, ('ran',)


class Getattr:
    def __reduce__(self):
        return getattr, (torch.Size, 'numel')


names = {distribution.name for distribution in distributions()}
assert 'onedl-mmengine' in names, names
mixed = names & {'mmengine', 'mmcv-lite', 'mmcv', 'mmpretrain'}
assert not mixed, f'beside the forks: {mixed}'

torch.save(Evil(), 'evil.pth')
torch.save(Getattr(), 'getattr.pth')
_safe_torch_load('evil.pth')
assert os.path.isdir('ran'), (
    'the fork is safe now: shorten compat.enable_safe_checkpoints'
)
os.rmdir('ran')

compat.enable()
torch.save({'a': torch.ones(2)}, 'good.pth')
for load in (_safe_torch_load, CheckpointLoader.load_checkpoint):
    for name in ('evil.pth', 'getattr.pth'):
        try:
            value = load(name)
        except Exception as error:
            print(name, load.__name__, 'refused:', error)
        else:  # a name that honest files hold is left out
            assert (value, name) == (None, 'getattr.pth'), (load, value)
            assert load.__name__ == 'load_checkpoint'
    assert load('good.pth')['a'].tolist() == [1, 1]
assert not os.path.isdir('ran'), 'code of a checkpoint ran'
