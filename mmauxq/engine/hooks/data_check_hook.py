from logging import Logger
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmpretrain.models import ClsHead
from torch import nn

from mmauxq.errors import UsageError, one_line
from mmauxq.network import forked_generators, profile
from mmauxq.network.profile import floating

from ..running import bare_model


class DataCheckHook(Hook):
    """Checks the first sample of each data set before the first step.

    An error of the data set itself is left to the loop, which meets it too.

    Raises:
        UsageError: If a data set is empty; its first sample has no ``inputs``,
            does not pass the data preprocessor, or is of a size on which the
            network cannot run; or it has more classes than the head.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Any) -> None:
        for name in ('train', 'val', 'test'):
            loop = getattr(runner, f'_{name}_loop')
            loader = getattr(loop, 'dataloader', None)
            if hasattr(loader, 'dataset'):
                _check(runner, loader, f'{name}_dataloader.dataset')

    before_test = before_train


def _check(runner: Any, loader: Any, place: str) -> None:
    dataset, model = loader.dataset, bare_model(runner)
    if len(dataset) == 0:
        raise UsageError(f'{place}: expected at least one sample, got none')
    try:
        with forked_generators(model):
            sample = dataset[0]
            samples: Any = [sample]
            if hasattr(dataset, '__getitems__'):  # as torch's loader does
                samples = dataset.__getitems__([0])
            batch = loader.collate_fn(samples)
    except Exception:
        return
    if not isinstance(sample, dict) or 'inputs' not in sample:
        got = f'a {type(sample).__name__}'
        if isinstance(sample, dict):
            got = f'the keys {sorted(map(str, sample))}'
        raise UsageError(
            f'{place}.pipeline: expected `inputs`, got {got}; a pipeline ends '
            "with dict(type='PackInputs')"
        )
    if isinstance(sample['inputs'], (list, tuple)):  # augmented for a test
        batch = {key: views[0] for key, views in batch.items()}
    _check_images(model, batch, place, runner.cfg.get('data_preprocessor'))
    _check_classes(model, dataset, place, runner.logger)


def _check_images(
    model: nn.Module, batch: Any, place: str, given: dict | None
) -> None:
    """Check that data preprocessor and network take the images."""
    preprocessor = 'data_preprocessor' + (f'={dict(given)}' if given else '')
    try:
        images = model.data_preprocessor(batch)['inputs']
    except Exception as error:
        where = f'on the first sample of {place}'
        raise UsageError(
            f'{preprocessor}: {one_line(error)} ({where})'
        ) from error
    cost = getattr(model, 'cost', None)
    shape = tuple(getattr(images, 'shape', ()))[1:]
    if cost is None or shape in ((), cost.shape):
        return
    try:
        with floating(model.architecture):
            profile(model.architecture, shape)
    except UsageError as error:
        raise UsageError(
            f'{place}: expected images on which the network runs, such as '
            f'{cost.shape}, got {shape} after {preprocessor}: {error}'
        ) from error


def _check_classes(
    model: nn.Module, dataset: Any, place: str, logger: Logger
) -> None:
    """Check that a single-label head has a class for each label."""
    prefix = 'model'
    if hasattr(model, 'architecture'):
        model, prefix = model.architecture, 'model.architecture'
    head = getattr(model, 'head', None)
    width = getattr(head, 'num_classes', None)
    if not isinstance(head, ClsHead) or not isinstance(width, int):
        return
    key = f'{prefix}.head.num_classes'
    names = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if names is None:
        count = 1 + max(_some_labels(dataset), default=-1)
        expected = f'{count} at least, for the labels of {place}'
    else:
        count, shown = len(names), ', '.join(map(str, names[:5]))
        classes = f'the classes of {place} ({shown}{", ..." * (count > 5)})'
        expected = f'{count}, {classes}'
    if width < count:
        raise UsageError(f'{key}: expected {expected}, got {width}')
    if width > count and names is not None:
        logger.warning(
            f'{key}={width} is more than the {count} of {classes}: the others '
            'are never right'
        )


def _some_labels(dataset: Any, most: int = 1000) -> list[int]:
    """Up to ``most`` labels, evenly spaced, without reading an image."""
    if not hasattr(dataset, 'get_data_info'):
        return []
    indices = range(0, len(dataset), -(-len(dataset) // most))
    labels = [dataset.get_data_info(i).get('gt_label') for i in indices]
    return [int(k) for k in labels if isinstance(k, (int, np.integer))]
