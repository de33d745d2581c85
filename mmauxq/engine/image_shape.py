"""The size of the images that a recipe trains on, from its data.

A pipeline that reads files is run alone, on two drawn images of different
sizes, so that a large data set is neither needed nor built. A pipeline that
fails on a file belongs to a data set that holds or generates its images. It is
built, with one image if its arguments can say so.
"""

import copy
import inspect
import tempfile
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor

from mmauxq.config_types import joint_section, type_name
from mmauxq.errors import UsageError, one_line
from mmauxq.network import forked_generators
from mmauxq.ranks import is_distributed, rank

from .config_validation import arguments_of

Shape = tuple[int, int, int]
DRAWN = ((375, 500), (480, 333))
"""Heights and widths of the images that a pipeline is tried on."""


def set_image_shape(cfg: Config, split: str = 'train') -> None:
    """Set ``cfg.model.input_shape`` from the data, if it is not given.

    A warning says where the data do not tell, so that JointQAT takes the size
    that the network was made for; another one, where the size that is given
    is not that of the images.

    Args:
        cfg: A complete recipe; recipes of other models are left alone.
        split: ``'train'``, or ``'val'`` for commands that only evaluate.
    """
    joint = joint_section(cfg.model)
    if joint is None:
        return
    given = joint.get('input_shape')
    for name in (split, 'val', 'test', 'train'):
        loader = f'{name}_dataloader'
        section = cfg.get(loader)
        if isinstance(section, dict) and section.get('dataset') is not None:
            break
    else:
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
        joint['input_shape'] = shape
    elif isinstance(given, (list, tuple)) and tuple(given) != shape:
        _warn(
            f'model.input_shape: expected {shape}, the images of {loader}, '
            f'got {tuple(given)}: multiply-adds are counted for the latter'
        )


def image_shape(cfg: Config, loader: str) -> Shape:
    """(C, H, W) of what a data loader gives; no random generator is moved.

    Raises:
        UsageError: If the images are of several sizes, or no images.
        Exception: What a data set or a transform raises.
    """
    dataset = cfg[loader]['dataset']
    if isinstance(dataset, dict):
        dataset = copy.deepcopy(dataset)
    scope = cfg.get('default_scope') or 'mmpretrain'
    with forked_generators(), DefaultScope.overwrite_default_scope(scope):
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


def _warn(message: str) -> None:
    if not rank():
        print(f'warning: {message}', flush=True)


def _pipeline(dataset: Any) -> list:
    """The transforms of a data set, or of the one that it wraps."""
    while isinstance(dataset, dict) and not dataset.get('pipeline'):
        inner = dataset.get('dataset') or dataset.get('datasets')
        dataset = inner[0] if isinstance(inner, (list, tuple)) else inner
    steps = list(dataset['pipeline'])
    for i, step in enumerate(steps):
        if isinstance(step, dict):  # the drawn files are local ones
            remote = ('backend_args', 'file_client_args')
            steps[i] = {k: v for k, v in step.items() if k not in remote}
    return steps


def _shapes_of_files(pipeline: list) -> set[Shape]:
    transform, shapes = Compose(pipeline), set()
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, 'drawn.png'))
        for size in DRAWN:
            mmcv.imwrite(np.full((*size, 3), 128, np.uint8), file)
            entry = dict(img_path=file, gt_label=0, sample_idx=0)
            shapes.add(_shape(transform(entry)))
    return shapes


def _lighten(dataset: dict) -> None:
    """Let a data set read one image, where its arguments can say so."""
    if isinstance(dataset.get('dataset'), dict):
        _lighten(dataset['dataset'])
    cls = dataset.get('type')
    if isinstance(cls, str):
        with DATASETS.switch_scope_and_registry(None) as registry:
            cls = registry.get(cls)
    known = (arguments_of(cls) or []) if inspect.isclass(cls) else []
    less = dict(indices=1, device='cpu')
    if type_name(dataset.get('type')) == 'mmauxq.HeldOut':
        dataset.update(count=0, part='rest')  # one image has no parts
    if is_distributed():
        less['download'] = False  # the runner lets one process do it
    dataset.update({k: v for k, v in less.items() if k in known})


def _shape(sample: Any) -> Shape:
    images = sample.get('inputs') if isinstance(sample, dict) else None
    if not isinstance(images, Tensor) or images.dim() != 3:
        raise UsageError('it gives no `inputs` of shape (C, H, W)')
    channels, height, width = images.shape
    return channels, height, width
