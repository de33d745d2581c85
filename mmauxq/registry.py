"""Registry nodes of the scope ``mmauxq``.

Each node names the package that holds its classes, so that a config which
says ``type='mmauxq.X'`` imports exactly that package. This file imports
nothing but MMEngine: an error raised here would be swallowed by MMEngine and
come back as "not in the registry".
"""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import FUNCTIONS as MMENGINE_FUNCTIONS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_CONSTRUCTORS,
)
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import Registry

# JointQAT, guidance and backbones
MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmauxq',
    locations=[
        'mmauxq.algorithms',
        'mmauxq.backbones',
        'mmauxq.guidance',
        'mmauxq.quantizers',
    ],
)
DATASETS = Registry(
    'dataset',
    parent=MMENGINE_DATASETS,
    scope='mmauxq',
    locations=['mmauxq.datasets'],
)
FUNCTIONS = Registry(
    'function',
    parent=MMENGINE_FUNCTIONS,
    scope='mmauxq',
    locations=['mmauxq.datasets'],
)
HOOKS = Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    scope='mmauxq',
    locations=['mmauxq.engine.hooks'],
)
LOOPS = Registry(
    'loop',
    parent=MMENGINE_LOOPS,
    scope='mmauxq',
    locations=['mmauxq.engine.resumable_loops'],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_CONSTRUCTORS,
    scope='mmauxq',
    locations=['mmauxq.engine.optimizers'],
)
OPTIM_WRAPPERS = Registry(
    'optim_wrapper',
    parent=MMENGINE_OPTIM_WRAPPERS,
    scope='mmauxq',
    locations=['mmauxq.engine.optimizers'],
)
