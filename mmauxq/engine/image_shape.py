"""The size of the images that a recipe trains on, from its data.

Shapes and multiply-adds are counted before the first image is seen. The size
is found without what makes a large data set slow to build:

* A pipeline that reads files is run alone, on two drawn images of different
  sizes. If both come out in one size, the network gets that size, whatever
  the transforms are called, and whether the data are there or not.
* A pipeline that fails on a file belongs to a data set which holds or
  generates its images. The data set is built, with one image if its arguments
  can say so, and its first sample is taken.
"""

import copy
import inspect
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor

from mmauxq.errors import UsageError, one_line
from mmauxq.ranks import is_distributed, rank

from .config_validation import arguments_of

Shape = tuple[int, int, int]
ORDER = dict(train=('train', 'val', 'test'), val=('val', 'test', 'train'))
DRAWN = ((375, 500), (480, 333))
"""Heights and widths of the images that a pipeline is tried on."""


def set_image_shape(cfg: Config, split: str = 'train') -> None:
    """Set ``cfg.model.input_shape`` from the data, if it is not given.

    Where the data do not tell, JointQAT takes the size that the network was
    made for, and a warning says so. Another warning says if the size that is
    given is not the size of the images.

    Args:
        cfg: A complete recipe; recipes of other models are left alone.
        split: ``'train'``, or ``'val'`` for commands that only evaluate.
    """
    if cfg.model.get('type') != 'mmauxq.JointQAT':
        return
    given = cfg.model.get('input_shape')
    loaders = [f'{name}_dataloader' for name in ORDER[split]]
    loader = next((name for name in loaders if _has_data(cfg, name)), None)
    if loader is None:
        return
    try:
        shape = image_shape(cfg, loader)
    except Exception as error:  # a data set may raise anything
        if given is None:
            _warn(
                f'{loader} does not tell the size of its images '
                f'({one_line(error, 200)}): multiply-adds are counted for the '
                'size that the network was made for; model.input_shape sets '
                'another'
            )
        return
    if given is None:
        cfg.model.input_shape = shape
    elif isinstance(given, (list, tuple)) and tuple(given) != shape:
        _warn(
            f'model.input_shape: expected {shape}, the images of {loader}, '
            f'got {tuple(given)}: multiply-adds are counted for the latter'
        )


def image_shape(cfg: Config, loader: str) -> Shape:
    """(C, H, W) of what a data loader gives; no random generator is moved.

    Args:
        cfg: A complete recipe; not changed.
        loader: Such as ``'train_dataloader'``.

    Raises:
        UsageError: If the images are of several sizes, or no images.
        Exception: What a data set or a transform raises.
    """
    dataset = cfg[loader]['dataset']
    if isinstance(dataset, dict):
        dataset = copy.deepcopy(dataset)
    scope = cfg.get('default_scope') or 'mmpretrain'
    with generators_kept(), DefaultScope.overwrite_default_scope(scope):
        try:
            shapes = _shapes_of_files(_pipeline(dataset))
        except Exception:  # whatever a transform raises, it takes no file
            if isinstance(dataset, dict):
                _lighten(dataset)
                dataset = DATASETS.build(dataset)
            shapes = {_shape(dataset[0])}
    if len(shapes) > 1:
        raise UsageError(f'its images have sizes such as {sorted(shapes)}')
    return shapes.pop()


def _has_data(cfg: Config, loader: str) -> bool:
    section = cfg.get(loader)
    return isinstance(section, dict) and section.get('dataset') is not None


def _warn(message: str) -> None:
    """Before a run has its log; the commands show it as they start."""
    if not rank():
        print(f'warning: {message}', flush=True)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Undo what happens to the random generators of this process inside."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(
        torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    )
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _pipeline(dataset: Any) -> list:
    """The transforms of a data set, or of the one that it wraps."""
    while isinstance(dataset, dict) and not dataset.get('pipeline'):
        inner = dataset.get('dataset') or dataset.get('datasets')
        dataset = inner[0] if isinstance(inner, (list, tuple)) else inner
    steps = dataset['pipeline'] if isinstance(dataset, dict) else []
    # the drawn files are local ones
    remote = ('backend_args', 'file_client_args')
    return [
        {k: v for k, v in step.items() if k not in remote}
        if isinstance(step, dict)
        else step
        for step in steps
    ]


def _shapes_of_files(pipeline: list) -> set[Shape]:
    transform = Compose(pipeline)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, 'drawn.png'))
        shapes = set()
        for size in DRAWN:
            mmcv.imwrite(np.full((*size, 3), 128, np.uint8), file)
            entry = dict(img_path=file, gt_label=0, sample_idx=0)
            shapes.add(_shape(transform(entry)))
    return shapes


def _lighten(dataset: dict) -> None:
    """Let a data set read one image, where its arguments can say so."""
    inner = dataset.get('dataset')
    if isinstance(inner, dict):
        _lighten(inner)
    cls = dataset.get('type')
    if isinstance(cls, str):
        with DATASETS.switch_scope_and_registry(None) as registry:
            cls = registry.get(cls)
    known = (arguments_of(cls) or []) if inspect.isclass(cls) else []
    less = dict(indices=1, device='cpu')
    if is_distributed():
        less['download'] = False  # the runner lets one process do it
    dataset.update({k: v for k, v in less.items() if k in known})


def _shape(sample: Any) -> Shape:
    images = sample.get('inputs') if isinstance(sample, dict) else None
    if not isinstance(images, Tensor) or images.dim() != 3:
        raise UsageError('it gives no `inputs` of shape (C, H, W)')
    channels, height, width = images.shape
    return channels, height, width
