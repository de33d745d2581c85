"""The teacher: a float classifier and its features."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor, nn

from mmauxq.errors import UsageError

from .taps import TapRecorder


class Teacher(nn.Module):
    """A classifier that runs on the images of F, converted from F's
    normalisation and order of colours to its own.

    Batch augmentations, which mix images, commute with that.

    Args:
        network: The classifier.
        recorder: Of what to read from it; gradients lead back from that, and
            from the logits, if it is one with gradients.
        preprocessor: Of F.
        trained: Whether it learns; else it stays in evaluation mode.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        recorder: TapRecorder,
        preprocessor: nn.Module | None,
        trained: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.trained = trained
        self.recorder = recorder
        own = getattr(network, 'data_preprocessor', None)
        rgb = [bool(getattr(p, 'to_rgb', False)) for p in (preprocessor, own)]
        self.flip = rgb[0] != rgb[1]
        mean, std = _normalisation(preprocessor, self.flip)
        own_mean, own_std = _normalisation(own, False)
        self.register_buffer('scale', std / own_std, persistent=False)
        self.register_buffer(
            'shift', (mean - own_mean) / own_std, persistent=False
        )
        self.same_normalisation = not self.flip and bool(
            (self.scale == 1).all() and (self.shift == 0).all()
        )
        if not trained:
            self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> 'Teacher':
        """A frozen teacher stays in evaluation mode."""
        return super().train(mode and self.trained)

    def init_weights(self) -> None:
        """Nothing: the weights are those of a checkpoint or of F."""

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (N, K) of F's images (N, C, H, W); what the recorder read, in
        the order of running."""
        if not self.same_normalisation:
            if self.flip:
                images = images.flip(1)
            images = images * self.scale + self.shift
        with (
            # entered outside of a compiled step, which cannot do it
            nullcontext() if self.recorder.active else self.recorder,
            nullcontext() if self.recorder.with_grad else torch.no_grad(),
        ):
            logits = self.network(images, mode='tensor')
        if isinstance(logits, (tuple, list)):
            logits = logits[0]
        return logits, list(self.recorder.outputs().values())


def _normalisation(
    preprocessor: nn.Module | None, flip: bool
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (C, 1, 1), that a preprocessor applies."""
    mean = getattr(preprocessor, 'mean', torch.zeros(1, 1, 1)).float()
    std = getattr(preprocessor, 'std', torch.ones(1, 1, 1)).float()
    return (mean.flip(0), std.flip(0)) if flip else (mean, std)


def build_network(teacher: str | dict) -> tuple[nn.Module, int | None]:
    """The classifier of a config, not initialised, and the side of its images
    in pixels, if its backbone or its test pipeline declares one.

    Args:
        teacher: ``'mmpretrain::...'`` or a file, with a ``model``; or the
            dict of such a config; or a ``model`` itself.

    Raises:
        UsageError: If it cannot be read or is no classifier.
    """
    name = teacher if isinstance(teacher, str) else 'dict(...)'
    place = f'guidance.teacher={name}'
    config = _read(teacher, place) if isinstance(teacher, str) else teacher
    model = config.get('model', config)
    if not isinstance(model, dict) or not model.get('head'):
        raise UsageError(
            f'{place}: expected the config of an image classifier with a head'
        )
    model = copy.deepcopy(dict(model))
    model.setdefault('_scope_', 'mmpretrain')
    preprocessor = config.get('data_preprocessor')
    if preprocessor is not None:
        model.setdefault('data_preprocessor', dict(preprocessor))
    try:
        network = MMPRETRAIN_MODELS.build(model)
    except Exception as error:  # a config can be wrong in any way
        raise UsageError(f'{place}: cannot be built: {error}') from error
    if not isinstance(getattr(network, 'backbone', None), nn.Module):
        raise UsageError(
            f'{place}: expected an image classifier, got a '
            f'{type(network).__name__}'
        )
    size = getattr(network.backbone, 'img_size', None)
    if size is None and config.get('input_shape'):
        size = config['input_shape'][-1]
    return network, _side(size) or crop_size(config)


def _read(teacher: str, place: str) -> dict:
    try:
        if '::' in teacher:
            return get_config(teacher)
        if Path(teacher).is_file():
            return Config.fromfile(teacher)
    except Exception as error:  # a config is code: it may raise anything
        raise UsageError(f'{place}: cannot be read: {error}') from error
    raise UsageError(f'{place}: does not exist')


def crop_size(config: dict) -> int | None:
    """What the test pipeline of a config crops or resizes to, in pixels."""
    loader = config.get('test_dataloader') or config.get('val_dataloader')
    pipeline = (loader or {}).get('dataset', {}).get('pipeline', [])
    size = None
    for step in pipeline:
        size = step.get('crop_size', step.get('scale', size))
    return _side(size)


def _side(size: Any) -> int | None:
    if isinstance(size, Sequence) and not isinstance(size, str) and size:
        size = size[0]
    return size if isinstance(size, int) and size > 0 else None
