"""Registry nodes of the scope ``mmauxq``.

Each node names the packages that hold its classes, so that a config which
says ``type='mmauxq.X'`` imports exactly these. This file imports nothing but
MMEngine: an error raised here would be swallowed by MMEngine and come back as
"not in the registry".
"""

from mmengine import registry


def _node(parent: registry.Registry, *packages: str) -> registry.Registry:
    return registry.Registry(
        parent.name,
        parent=parent,
        scope='mmauxq',
        locations=[f'mmauxq.{package}' for package in packages],
    )


MODELS = _node(
    registry.MODELS, 'algorithms', 'backbones', 'guidance', 'quantizers'
)
DATASETS = _node(registry.DATASETS, 'datasets')
FUNCTIONS = _node(registry.FUNCTIONS, 'datasets')
HOOKS = _node(registry.HOOKS, 'engine.hooks')
LOOPS = _node(registry.LOOPS, 'engine.resumable_loops')
MODEL_WRAPPERS = _node(registry.MODEL_WRAPPERS, 'engine.recorded_ddp')
OPTIM_WRAPPERS = _node(registry.OPTIM_WRAPPERS, 'engine.optimizers')
