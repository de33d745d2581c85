"""What MMPretrain and MMEngine register, and the tools that they ship."""

import mmengine.registry
import mmpretrain.registry
from mmengine.registry import Registry
from mmpretrain.utils import register_all_modules

from .project import TOOLS

FAMILIES = (
    'HOOKS', 'OPTIM_WRAPPER_CONSTRUCTORS', 'OPTIM_WRAPPERS', 'OPTIMIZERS',
    'PARAM_SCHEDULERS', 'LOOPS', 'RUNNERS', 'EVALUATORS', 'METRICS',
    'MODEL_WRAPPERS', 'VISUALIZERS', 'LOG_PROCESSORS', 'BATCH_AUGMENTS',
    'DATA_SAMPLERS',
)  # fmt: skip
"""Names of registries in the module ``registry`` of both packages."""
PACKAGES = ('mmcv', 'mmengine', 'mmpretrain', 'torch')
"""Whose parts count: MMRazor and others register theirs there, too, once they
are imported."""


def registered_parts() -> dict[str, str]:
    """``REGISTRY/SCOPE.TYPE`` -> module, of all parts of both packages."""
    register_all_modules(init_default_scope=False)
    found: dict[str, str] = {}
    for family in FAMILIES:
        for registry in _registries(family):
            registry.import_from_location()
            for name, part in sorted(registry.module_dict.items()):
                if part.__module__.partition('.')[0] in PACKAGES:
                    key = f'{family}/{registry.scope}.{name}'
                    found[key] = part.__module__
    return found


def _registries(family: str) -> list[Registry]:
    singular = family.removesuffix('S')  # mmengine says EVALUATOR
    named = [
        getattr(mmpretrain.registry, family, None),
        getattr(mmengine.registry, family, None)
        or getattr(mmengine.registry, singular, None),
    ]
    return [registry for registry in named if registry is not None]


def shipped_tools() -> dict[str, str]:
    """``tools/PATH`` -> where it lies in the package, of all of MMPretrain's
    tools in Python."""
    files = sorted(file.relative_to(TOOLS) for file in TOOLS.rglob('*.py'))
    return {f'tools/{file}': f'mmpretrain/.mim/tools/{file}' for file in files}
