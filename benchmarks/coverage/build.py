"""F and H of a config, and a batch for them."""

import copy
from collections.abc import Sequence

import torch
from mmengine.config import Config
from torch import nn

from mmauxq.algorithms import JointQAT
from mmauxq.errors import UsageError, one_line
from mmauxq.network.profile import count_parameters, floating, profile

from .command import BATCH, set_up, set_up_float
from .configs import (
    USUAL_SIZE,
    WIDTH,
    NetworkError,
    float_network,
    limit_size,
    linear_head,
    recipe,
)
from .row import Row

SMALL_SIZE = 64


def prepare(row: Row) -> Config:
    """The recipe of ``row.config``, with a head and of a size to try."""
    head = linear_head(row.config)
    cfg = recipe(row.config, head)
    backbone = cfg.model.architecture.backbone
    row.backbone = backbone.type
    size = limit_size(backbone)
    if size is not None:
        row.note(f'tried at {USUAL_SIZE} pixels instead of {size}')
        _resize(cfg, USUAL_SIZE)
    if head:
        row.note('shipped without a head; tried with a linear one')
    return cfg


def _resize(cfg: Config, size: int) -> None:
    shape = cfg.model.get('input_shape')
    if shape is not None:
        cfg.model.input_shape = (shape[0], size, size)


def build_small(cfg: Config, row: Row) -> JointQAT:
    """Build with small images where the network takes them: it is faster.

    Args:
        cfg: Of :func:`prepare`.
        row: Is told what was built.
    """
    small = copy.deepcopy(cfg)
    backbone = small.model.architecture.backbone
    size = backbone.get('img_size')
    if isinstance(size, int) and size > USUAL_SIZE:
        backbone.img_size = USUAL_SIZE
        _resize(small, USUAL_SIZE)
    elif not size:
        _resize(small, SMALL_SIZE)
    try:
        return build(small, row)
    except Exception:  # whatever it raises, the full size will tell
        return build(cfg, row)


def build(cfg: Config, row: Row) -> JointQAT:
    """F and H, as ``mmauxq train`` would train them.

    Args:
        cfg: Of :func:`prepare`.
        row: Is told what was built.

    Raises:
        NetworkError: If MMPretrain alone cannot train it either.
    """
    try:
        shape = cfg.model.get('input_shape') or profile(float_of(cfg)).shape
        model = set_up(cfg, shape)
    except Exception:
        _check_float(cfg, row)
        raise
    cost = model.cost
    row.parameters = cost.parameters / 1e6
    row.quantized = sum(not bits.is_float for bits in model.bits.values())
    row.kept = {
        name: bits.reason or 'bits'
        for name, bits in model.bits.items()
        if bits.is_float
    }
    row.taps = len(model.taps)
    row.layouts = list(dict.fromkeys(tap.layout for tap in model.taps))
    row.guidance_parameters = cost.guidance_parameters / 1e6
    row.guidance_multiply_adds = (
        cost.guidance_multiply_adds / cost.multiply_adds
    )
    return model


def settings(cfg: Config) -> dict:
    """``model``, with the data preprocessor that the runner puts into it."""
    model = cfg.model.to_dict()
    if cfg.get('data_preprocessor') is not None:
        model['data_preprocessor'] = cfg.data_preprocessor.to_dict()
    return model


def float_of(cfg: Config) -> nn.Module:
    """The float network of a recipe."""
    return float_network(cfg.model.architecture, cfg.get('data_preprocessor'))


def _check_float(cfg: Config, row: Row) -> None:
    """Raise NetworkError if MMPretrain cannot train the float network."""
    network = float_of(cfg).eval()
    row.parameters = count_parameters(network) / 1e6
    try:
        shape = profile(network, cfg.model.get('input_shape')).shape
        set_up_float(cfg, shape)
    except Exception as error:
        raise NetworkError(one_line(error, WIDTH)) from error


def small_shape(model: JointQAT) -> tuple[int, ...]:
    """The smaller of two (C, H, W) on which F runs: 64 pixels, or its own."""
    full = model.cost.shape
    if getattr(model.architecture.backbone, 'img_size', None) is not None:
        return full
    small = (full[0], SMALL_SIZE, SMALL_SIZE)
    try:
        with floating(model.architecture):
            profile(model.architecture, small)
    except UsageError:
        return full
    return min(full, small)


def batch(model: JointQAT, shape: Sequence[int], count: int = BATCH) -> dict:
    """Random images with labels, through the model's data preprocessor.

    Args:
        model: In training mode.
        shape: (C, H, W).
        count: Number of images.
    """
    from mmpretrain.models import MultiLabelClsHead
    from mmpretrain.structures import DataSample

    multi = isinstance(model.architecture.head, MultiLabelClsHead)
    classes = model.cost.num_classes
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (count, *shape), generator=generator, dtype=torch.uint8
    )
    samples = []
    for i in range(count):
        label = i % classes
        sample = DataSample()
        sample.set_gt_label([label] if multi else label)
        sample.set_field(classes, 'num_classes', field_type='metainfo')
        samples.append(sample)
    return model.data_preprocessor(
        dict(inputs=list(images), data_samples=samples), True
    )
