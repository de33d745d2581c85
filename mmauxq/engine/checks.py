"""Whether a config and the paths of a command can be what they should be."""

import os
import tempfile
from logging import Logger
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmpretrain.models import ClsHead
from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.network.profile import floating, profile

from .image_shape import generators_kept
from .running import bare_model


def check_model(cfg: Config, path: str) -> None:
    model = cfg.get('model')
    if not isinstance(model, dict):
        raise UsageError(f'{path} has no `model`')
    network = model.get('architecture', model)
    if not isinstance(network, dict):
        raise UsageError(
            f'model.architecture: expected the config of a classifier, got '
            f'{network!r}'
        )
    if 'type' not in network:
        raise UsageError(f'{path} has no classifier: `model` has no `type`')
    if 'type' not in model:
        raise UsageError(f'{path}: `model` has no `type`')
    if 'backbone' in network and not network.get('head'):
        raise UsageError(
            f'{path} has no classifier: `model` has a backbone but no head'
        )


def check_training(cfg: Config, path: str) -> None:
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
        if cfg.get(key) is None:
            raise UsageError(f'{path} has no `{key}`')


def set_work_dir(cfg: Config, config: str, work_dir: str | None) -> None:
    """Decide on the work directory and see that it can be written."""
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(config).stem)
    try:
        os.makedirs(cfg.work_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=cfg.work_dir):
            pass
    except OSError as error:
        raise UsageError(
            f'work dir {cfg.work_dir} cannot be written: {error.strerror}'
        ) from error


def writable_file(path: str) -> Path:
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open('a'):
            pass
    except OSError as error:
        raise UsageError(
            f'--out {path} cannot be written: {error.strerror}'
        ) from error
    return file


def check_samples(runner: Any) -> None:
    """See that what the data sets give can enter the model.

    An error of the data set itself is left to the loop, which meets it too.

    Args:
        runner: Whose loops are built, before the first step.

    Raises:
        UsageError: If a data set is empty; its first sample has no ``inputs``,
            does not pass the data preprocessor, or is of a size on which the
            network cannot run; or it has more classes than the head.
    """
    for name in ('train', 'val', 'test'):
        loop = getattr(runner, f'_{name}_loop')
        dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', None)
        if dataset is None:
            continue
        place = f'{name}_dataloader.dataset'
        if len(dataset) == 0:
            raise UsageError(
                f'{place}: expected one sample at least, got none'
            )
        try:
            with generators_kept():
                sample = dataset[0]
                batch = _batch(loop.dataloader, sample)
        except Exception:
            continue
        if not isinstance(sample, dict) or 'inputs' not in sample:
            raise UsageError(
                f'{place}.pipeline: expected `inputs`, got {_keys(sample)}; '
                "a pipeline ends with dict(type='PackInputs')"
            )
        _check_images(runner, batch, place)
        _check_classes(bare_model(runner), dataset, place, runner.logger)


def _batch(loader: Any, sample: Any) -> Any:
    """A batch of the first sample, as torch's loader puts it together."""
    if hasattr(loader.dataset, '__getitems__'):
        return loader.collate_fn(loader.dataset.__getitems__([0]))
    return loader.collate_fn([sample])


def _check_images(runner: Any, batch: Any, place: str) -> None:
    """They pass the data preprocessor; what comes out, the network takes."""
    model = bare_model(runner)
    given = runner.cfg.get('data_preprocessor')
    preprocessor = 'data_preprocessor' + (f'={dict(given)}' if given else '')
    try:
        images = model.data_preprocessor(batch)['inputs']
    except Exception as error:
        raise UsageError(
            f'{preprocessor}: {type(error).__name__}: '
            f'{" ".join(str(error).split())} (on the first sample of {place})'
        ) from error
    cost = getattr(model, 'cost', None)
    if cost is None or not isinstance(images, Tensor):
        return
    shape = tuple(images.shape[1:])
    if shape == tuple(cost.shape):
        return
    try:
        with floating(model.architecture):
            profile(model.architecture, shape)
    except UsageError as error:
        raise UsageError(
            f'{place}: expected images on which the network runs, such as '
            f'{tuple(cost.shape)}, got {shape} after {preprocessor}: {error}'
        ) from error


def _check_classes(
    model: nn.Module, dataset: Any, place: str, logger: Logger
) -> None:
    """Labels are to be below the number of classes of a single-label head."""
    prefix = (
        'model.architecture' if hasattr(model, 'architecture') else 'model'
    )
    head = getattr(getattr(model, 'architecture', model), 'head', None)
    width = getattr(head, 'num_classes', None)
    if not isinstance(head, ClsHead) or not isinstance(width, int):
        return
    names = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if names is not None:
        count, shown = len(names), ', '.join(map(str, names[:5]))
        what = f'the classes of {place} ({shown}{", ..." * (count > 5)})'
    else:
        count = 1 + max(_some_labels(dataset), default=-1)
        what = f'for the labels of {place}'
    key = f'{prefix}.head.num_classes'
    if width < count:
        least = '' if names is not None else ' at least'
        raise UsageError(
            f'{key}: expected {count}{least}, {what}, got {width}'
        )
    if names is not None and width > count:
        logger.warning(
            f'{key}={width} is more than the {count} of {what}: the others '
            'are never right'
        )


def _some_labels(dataset: Any, most: int = 1000) -> list[int]:
    """Labels of up to ``most`` samples, evenly spaced, without their images.

    None of a data set that cannot give them without reading an image.
    """
    if not hasattr(dataset, 'get_data_info'):
        return []
    step = -(-len(dataset) // most)
    labels = [
        dataset.get_data_info(i).get('gt_label')
        for i in range(0, len(dataset), step)
    ]
    return [int(k) for k in labels if isinstance(k, (int, np.integer))]


def _keys(sample: Any) -> str:
    if isinstance(sample, dict):
        return f'the keys {sorted(map(str, sample))}'
    return f'a {type(sample).__name__}'
