"""A trained network, as a config and a checkpoint describe it."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.models import MultiLabelClsHead
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.config_types import JOINT, type_name
from mmauxq.errors import UsageError
from mmauxq.log import quiet_log
from mmauxq.network import sample_images
from mmauxq.network.checkpoint import (
    check_architecture,
    check_same_bits,
    check_scales,
    meta_of,
    normalise,
)
from mmauxq.registry import MODELS

from .image_pipeline import image_pipeline
from .slim import class_names


@dataclass
class Network:
    """F, ready to export: the algorithm in evaluation mode, without guidance,
    on the CPU; the config of its training; the meta of its checkpoint."""

    algorithm: Any
    cfg: Config
    meta: dict

    @property
    def architecture(self) -> Any:
        """F itself."""
        return self.algorithm.architecture

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return isinstance(self.architecture.head, MultiLabelClsHead)

    def samples(self, split: str = 'val') -> Iterator[tuple[Tensor, list]]:
        """Preprocessed images (N, C, H, W) and their data samples, of the
        split ``'train'`` or ``'val'``."""
        from mmengine.runner import Runner

        loader = self.cfg.get(f'{split}_dataloader')
        if loader is None:
            raise UsageError(f'the config has no `{split}_dataloader`')
        for data in Runner.build_dataloader(copy.deepcopy(loader), seed=0):
            data = self.algorithm.data_preprocessor(data, False)
            images = data['inputs'].float()
            yield images, data.get('data_samples') or [{}] * len(images)

    def batches(self, split: str = 'val') -> Iterator[tuple[Tensor, Tensor]]:
        """The images of :meth:`samples` and labels (N,), -1 if unknown.
        Several labels count as unknown."""
        for images, samples in self.samples(split):
            labels = [-1 if self.multi_label else _label(s) for s in samples]
            yield images, torch.tensor(labels)

    def images(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The first validation images and labels, in batches of at most 250;
        16 generated images if ``count`` is 0."""
        if not count:
            shape = self.algorithm.cost.shape
            images = sample_images(self.architecture, shape, 16)
            return [(images, torch.full((16,), -1))]
        result: list[tuple[Tensor, Tensor]] = []
        for batch in first(self.batches(), count):
            parts = (tensor.split(250) for tensor in batch)
            result += zip(*parts, strict=True)
        return result

    def describe(self) -> dict[str, Any]:
        """Pre-processing and classes, for JSON; ``image_pipeline`` is
        ``'unknown'`` where the config does not tell."""
        pre = self.algorithm.data_preprocessor

        def numbers(name: str) -> list[float] | None:
            value = getattr(pre, name, None)
            if value is None:
                return None
            return [float(f'{x:.7g}') for x in value.flatten().tolist()]

        keys = 'to_rgb', 'channel_conversion'
        swaps = any(getattr(pre, key, False) for key in keys)
        steps = image_pipeline(self.cfg)
        return dict(
            mean=numbers('mean'),
            std=numbers('std'),
            channel_order='RGB' if swaps else 'as read',
            image_pipeline='unknown' if steps is None else steps,
            classes=class_names(self.meta),
        )

    def usage(self) -> dict[str, str]:
        """How to use an artefact, in words."""
        after = 'class = argmax(logits), probabilities = softmax'
        if self.multi_label:
            after = 'probabilities = sigmoid(logits)'
        before = 'images = (pixels 0..255 - mean) / std, NCHW'
        return dict(preprocessing=before, postprocessing=after)


def first(
    batches: Iterable[tuple[Tensor, Any]], count: int
) -> Iterator[tuple[Tensor, Any]]:
    """The first ``count`` images, and what batches have beside them."""
    for images, others in batches:
        yield images[:count], others[:count]
        count -= len(images)
        if count <= 0:
            return


def _label(sample: Any) -> int:
    label = sample.get('gt_label')
    return -1 if label is None or label.numel() != 1 else int(label)


def load_network(cfg: Config, checkpoint: str) -> Network:
    """Build F and fill it.

    Raises:
        UsageError: If the config trains no quantized network, or the
            checkpoint is not one of this network, trained and calibrated.
    """
    check_config(cfg)
    content = read_checkpoint(checkpoint)
    state = normalise(content, str(checkpoint))
    algorithm = build(cfg, None).cpu().eval()
    check_architecture(algorithm.architecture, state, str(checkpoint))
    check_scales(algorithm.architecture, state, str(checkpoint))
    meta = meta_of(content)
    check_same_bits(algorithm.architecture, meta, str(checkpoint))
    algorithm.architecture.load_state_dict(state, strict=False)
    return Network(algorithm, cfg, meta)


def check_config(cfg: Config) -> None:
    """Set MMEngine's scope to that of a config, or raise a UsageError if it
    trains no quantized network."""
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    if type_name(cfg.model.get('type')) != JOINT:
        raise UsageError(
            "model.type: expected 'mmauxq.JointQAT', which trains quantized "
            f'networks, got {cfg.model.get("type")!r}'
        )


def build(cfg: Config, guidance: Any, **settings: Any) -> Any:
    """The algorithm of a config, with this guidance and other settings."""
    model = copy.deepcopy(cfg.model)
    model.update(guidance=guidance, float_checkpoint=None, **settings)
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return MODELS.build(model)


def calibrated_network(cfg: Config) -> Network:
    """A network with random weights, and scales from generated images.

    No slope of a batch norm is left at zero, as MMPretrain's residual networks
    begin: a layer that changes nothing would be none to export or to time.
    """
    torch.manual_seed(0)
    algorithm = build(cfg, None).cpu()
    with quiet_log():  # MMEngine names each parameter
        algorithm.init_weights()
    for module in algorithm.architecture.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            if not module.weight.any():
                nn.init.ones_(module.weight)
    images = torch.randn(4, *algorithm.cost.shape)
    algorithm.train().calibrate(images)
    return Network(algorithm.eval(), cfg, {})


def guidance_cost(
    cfg: Config, shape: Sequence[int] | None = None
) -> dict[str, Any]:
    """What the guidance of a config costs in training, for one image of shape
    (C, H, W), by default as ``cfg`` says.

    Parameters and multiply-adds are ``None`` if the guidance cannot be built,
    as with a teacher whose file is gone.
    """
    guidance = cfg.model.get('guidance')
    if guidance is None:
        return dict(type=None, parameters=0, multiply_adds=0)
    parts = guidance if isinstance(guidance, (list, tuple)) else [guidance]
    names = ' and '.join(type_name(part['type']) for part in parts)
    settings = {} if shape is None else dict(input_shape=tuple(shape))
    try:
        cost = build(cfg, guidance, **settings).cost
    except (UsageError, OSError):
        return dict(type=names, parameters=None, multiply_adds=None)
    return dict(
        type=names,
        parameters=cost.guidance_parameters,
        multiply_adds=cost.guidance_multiply_adds,
    )
