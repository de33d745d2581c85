"""What a config does to an image file before the network's own
pre-processing."""

import inspect
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from mmauxq.config_types import type_name

PACKAGES = '', 'mmcv', 'mmpretrain'
READ, PACK = 'LoadImageFromFile', 'PackInputs'
KNOWN = ('Resize', 'ResizeEdge', 'CenterCrop')
"""Transforms that change an image as their arguments say, and nothing else."""


def image_pipeline(cfg: Config) -> list[dict[str, Any]] | None:
    """The steps of the validation pipeline of a config, for JSON.

    Each has its ``type`` and all arguments, also those that the config leaves
    to their defaults, such as ``interpolation``. Reading and packing are left
    out.

    Returns:
        ``None`` if the config tells no pipeline, or one with other transforms
        than :data:`KNOWN`.
    """
    for split in ('val', 'test'):
        loader = cfg.get(f'{split}_dataloader') or {}
        dataset = loader.get('dataset')
        while isinstance(dataset, Mapping) and 'pipeline' not in dataset:
            dataset = dataset.get('dataset')  # of a wrapper
        if isinstance(dataset, Mapping):
            return _steps(dataset['pipeline'])
    return None


def _steps(pipeline: Any) -> list[dict[str, Any]] | None:
    result = []
    for step in pipeline:
        if not isinstance(step, Mapping):
            return None
        package, _, name = type_name(step['type']).rpartition('.')
        if package not in PACKAGES or name not in (READ, PACK, *KNOWN):
            return None
        if name in KNOWN:
            result.append(dict(type=name, **_arguments(name, step)))
    return result


def _arguments(name: str, step: Mapping) -> dict[str, Any]:
    transform = TRANSFORMS.get(f'mmpretrain.{name}')
    arguments = {
        key: parameter.default
        for key, parameter in inspect.signature(transform).parameters.items()
        if parameter.default is not parameter.empty
    }
    given = {k: v for k, v in step.items() if k not in ('type', '_scope_')}
    return arguments | given
