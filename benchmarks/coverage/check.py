"""Whether the three lines of config are enough for one network, and why not.

F and H are built from a config of MMPretrain and trained for two steps on
random images; everything that the package promises for them is checked.
"""

import copy
import os
import random
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmauxq.algorithms import JointQAT, dry_run
from mmauxq.analysis import count_levels
from mmauxq.guidance.teacher import crop_size
from mmauxq.layers import QuantizedLayer, restore
from mmauxq.quantizers import named_quantizers
from mmauxq.registry import MODELS

from .mmpretrain_configs import (
    BATCH,
    NetworkError,
    NoRandomFill,
    float_network,
    one_line,
    recipe,
)

SMALL, USUAL, LARGE = 64, 224, 512
STEPS = 2
LEARNING_RATE = 1e-3


@dataclass
class Row:
    """What was found for one config.

    Args:
        config: Path below MMPretrain's ``configs``, or of a file.
        backbone: Its registered type.
        verdict: ``'pass'``, ``'fail'`` or ``'mmpretrain'``: the float network
            itself cannot be built or run here.
        reason: Why it is no pass, or what was changed to try it.
        parameters: Of F, in millions.
        quantized: Number of layers whose operands are quantized.
        kept: Name of a layer that stays float -> why.
        taps: Number of places that are read.
        layouts: Their tensor layouts, in order of appearance.
        guidance_parameters: Of H, in millions.
        guidance_multiply_adds: Of H over those of F.
        signed: Input quantizers that found negative values, and all of them.
        moved: Learned scales that the steps moved, and all of them.
        seconds: Wall time.
    """

    config: str
    backbone: str = ''
    verdict: str = 'fail'
    reason: str = ''
    parameters: float = 0.0
    quantized: int = 0
    kept: dict[str, str] = field(default_factory=dict)
    taps: int = 0
    layouts: list[str] = field(default_factory=list)
    guidance_parameters: float = 0.0
    guidance_multiply_adds: float = 0.0
    signed: tuple[int, int] = (0, 0)
    moved: tuple[int, int] = (0, 0)
    seconds: float = 0.0

    def note(self, text: str) -> None:
        """Add to the reason, once."""
        if text not in self.reason:
            self.reason = '; '.join(filter(None, [self.reason, text]))


def count_only(config: str) -> Row:
    """The size of the float network, nothing else."""
    row = Row(config)
    try:
        cfg = recipe(config)
        with NoRandomFill():
            network = float_network(cfg)
        row.parameters = dry_run.count_parameters(network) / 1e6
    except Exception as error:
        row.reason = one_line(error)
        return row
    row.verdict = 'pass' if cfg.model.architecture.get('head') else 'headless'
    return row


def try_config(config: str, build_only: bool = False) -> Row:
    """Build F and H for ``config``, and see whether they train.

    Args:
        config: As from :func:`classifier_configs`.
        build_only: Build, and do not train.
    """
    row = Row(config)
    started = time.time()
    try:
        init_default_scope('mmpretrain')
        torch.manual_seed(0)
        cfg = recipe(config)
        row.backbone = cfg.model.architecture.backbone.type
        _limit_size(cfg, row)
        if build_only:
            with NoRandomFill():
                _build_small(cfg, row)
        else:
            _train(cfg, *_build(cfg, row), row)
        row.verdict = 'pass'
    except NetworkError as error:
        row.verdict, row.reason = 'mmpretrain', one_line(error)
    except Exception as error:
        row.reason = one_line(error)
        if os.environ.get('MMAUXQ_SWEEP_DEBUG'):
            traceback.print_exc()
    row.seconds = time.time() - started
    return row


class _Failed(Exception):
    """A check that did not hold; the message says which."""


def _limit_size(cfg: Config, row: Row) -> None:
    """Try what is made for very large images with usual ones."""
    backbone = cfg.model.architecture.backbone
    size = backbone.get('img_size')
    if isinstance(size, int) and size > LARGE:
        backbone.img_size = USUAL
        row.note(f'tried at {USUAL} pixels instead of {size}')


def _build_small(cfg: Config, row: Row) -> None:
    """Build with small images where the network takes them: it is faster."""
    small = copy.deepcopy(cfg)
    size = small.model.architecture.backbone.get('img_size')
    if isinstance(size, int) and size > USUAL:
        small.model.architecture.backbone.img_size = USUAL
    try:
        _build(small, row, None if size else SMALL)
    except Exception:  # whatever it raises, the full size will tell
        _build(cfg, row)


def _build(
    cfg: Config, row: Row, size: int | None = None
) -> tuple[JointQAT, dict]:
    """The algorithm, and what it was built with."""
    network = float_network(cfg)
    if not cfg.model.architecture.get('head'):
        row.note('shipped without a head; tried with a linear one')
    row.parameters = dry_run.count_parameters(network) / 1e6
    settings = cfg.model.to_dict()
    settings['architecture'] = network
    if not getattr(network.backbone, 'img_size', None):
        size = size or crop_size(cfg)
        if size is not None:
            channels = dry_run.input_shape(network)[0]
            settings['input_shape'] = (channels, size, size)
    try:
        model = MODELS.build(settings)
    except Exception:
        # whose fault is it?
        _check_float(float_network(cfg), settings)
        raise
    row.quantized = sum(not bits.is_float for bits in model.bits.values())
    row.kept = {
        name: bits.reason or 'bits'
        for name, bits in model.bits.items()
        if bits.is_float
    }
    cost = model.cost
    row.taps = len(model.taps)
    row.layouts = list(dict.fromkeys(tap.layout for tap in model.taps))
    row.guidance_parameters = cost.guidance_parameters / 1e6
    row.guidance_multiply_adds = (
        cost.guidance_multiply_adds / cost.multiply_adds
    )
    return model, settings


def _check_float(network: nn.Module, settings: dict) -> None:
    """Raise NetworkError if the float network does not run."""
    shape = settings.get('input_shape') or dry_run.input_shape(network)
    network.eval()
    try:
        with torch.no_grad():
            network(dry_run.sample(network, shape, BATCH), mode='tensor')
    except Exception as error:
        raise NetworkError(
            f'a forward pass on {shape} fails: {one_line(error)}'
        ) from error


def _check_conversion(model: JointQAT, shape: Sequence[int]) -> None:
    """With idle quantizers F computes what the float network does."""
    network = model.architecture.eval()
    inputs = dry_run.sample(network, shape, BATCH)
    with torch.no_grad(), dry_run.floating(network):
        quantized = _flat(network(inputs, mode='tensor'))
        floats = _flat(restore(copy.deepcopy(network))(inputs, mode='tensor'))
    for a, b in zip(quantized, floats, strict=True):
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-4):
            raise _Failed('the conversion changes what F computes')


def _data(model: JointQAT, shape: Sequence[int], classes: int) -> dict:
    from mmpretrain.models import MultiLabelClsHead
    from mmpretrain.structures import DataSample

    multi = isinstance(model.architecture.head, MultiLabelClsHead)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (BATCH, *shape), generator=generator, dtype=torch.uint8
    )
    samples = []
    for i in range(BATCH):
        label = i % classes
        sample = DataSample()
        sample.set_gt_label([label] if multi else label)
        sample.set_field(classes, 'num_classes', field_type='metainfo')
        samples.append(sample)
    return model.data_preprocessor(
        dict(inputs=list(images), data_samples=samples), True
    )


def _small_enough(model: JointQAT) -> tuple[int, ...]:
    """The smallest of a few sizes on which F runs."""
    full = model.cost.shape
    small = (full[0], SMALL, SMALL)
    if getattr(model.architecture.backbone, 'img_size', None) is None:
        try:
            with dry_run.floating(model.architecture):
                dry_run.run(
                    model.architecture,
                    dry_run.sample(model.architecture, small),
                )
            return min(full, small)
        except Exception:
            pass
    return full


def _train(cfg: Config, model: JointQAT, settings: dict, row: Row) -> None:
    """The checks that need training steps."""
    random.seed(0)
    model.init_weights()
    shape = _small_enough(model)
    _check_conversion(model, shape)
    model.train()
    classes = model.cost.num_classes
    learned = dict(named_quantizers(model.architecture))
    negative: dict[str, bool] = {}

    def note_sign(name: str, args: tuple) -> None:
        negative.setdefault(name, bool(args[0].min() < 0))

    handles = [
        quantizer.register_forward_pre_hook(
            lambda _, args, name=name: note_sign(name, args)
        )
        for name, quantizer in learned.items()
        if quantizer.role == 'activation'
    ]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE)
    before: dict[str, Tensor] = {}
    for step in range(STEPS):
        torch.manual_seed(step)
        losses = model(**_data(model, shape, classes), mode='loss')
        before = before or {
            name: _scale(q).clone() for name, q in learned.items()
        }
        terms = {k: v for k, v in losses.items() if 'loss' in k}
        bad = [k for k, v in terms.items() if not bool(torch.isfinite(v))]
        if bad:
            raise _Failed(f'step {step + 1}: {bad[0]} is not finite')
        for part in ('student.', 'guidance.'):
            if not any(name.startswith(part) for name in terms):
                raise _Failed(f'no loss {part}*')
        if step == STEPS - 1:
            _check_guidance_gradient(model, terms)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
    for handle in handles:
        handle.remove()
    row.moved = (
        sum(not torch.equal(_scale(q), before[n]) for n, q in learned.items()),
        len(learned),
    )
    if row.moved[0] < row.moved[1]:
        name = next(
            n for n, q in learned.items() if torch.equal(_scale(q), before[n])
        )
        raise _Failed(
            f'{row.moved[1] - row.moved[0]} of {row.moved[1]} learned scales '
            f'did not move, such as {name}'
        )
    row.signed = (sum(negative.values()), len(negative))
    wrong = [n for n, v in negative.items() if bool(learned[n].signed) != v]
    if wrong:
        raise _Failed(f'{wrong[0]} has the wrong sign')
    _check_levels(model, shape)
    _check_dropping(model, settings, cfg, shape)


def _scale(quantizer: nn.Module) -> Tensor:
    return quantizer.step.detach()


def _check_guidance_gradient(model: JointQAT, terms: dict) -> None:
    name, layer = next(
        (name, module)
        for name, module in _running_layers(model)
        if isinstance(module, QuantizedLayer)
    )
    # of a frozen layer, only the scales are trained
    weight = layer.product_weight
    if not weight.requires_grad:
        weight = layer.input_quantizer.step
    # not autograd.grad: reversible networks write .grad in their backward
    model.zero_grad()
    sum(v for k, v in terms.items() if k.startswith('guidance.')).backward(
        retain_graph=True
    )
    gradient = weight.grad
    if gradient is None or not bool(gradient.abs().sum() > 0):
        raise _Failed(f'no gradient of the guidance reaches {name}')
    model.zero_grad()


def _running_layers(model: JointQAT) -> Iterator[tuple[str, nn.Module]]:
    modules = dict(model.architecture.named_modules(remove_duplicate=False))
    for name in model.bits:
        yield name, modules[name]


def _check_levels(model: JointQAT, shape: Sequence[int]) -> None:
    model.eval()
    inputs = torch.randn(BATCH, *shape)
    for count in count_levels(model.architecture, inputs):
        if not count.holds:
            raise _Failed(
                f'{count.name} holds {count.levels} values at {count.bits} bit'
            )


def _check_dropping(
    model: JointQAT, settings: dict, cfg: Config, shape: Sequence[int]
) -> None:
    plain = MODELS.build(
        dict(settings, architecture=float_network(cfg), guidance=None)
    )
    # tensor by tensor: LoRA's state dict, for one, leaves out what is frozen
    _copy_tensors(model.architecture, plain.architecture)
    names = {n for n, _ in plain.named_parameters()}
    mine = {
        n for n, _ in model.named_parameters() if not n.startswith('guidance.')
    }
    if names != mine:
        raise _Failed('F has other parameters than without guidance')
    plain.eval()
    inputs = torch.randn(BATCH, *shape)
    with torch.no_grad():
        pairs = zip(
            _flat(model(inputs, mode='tensor')),
            _flat(plain(inputs, mode='tensor')),
            strict=True,
        )
        if not all(torch.equal(a, b) for a, b in pairs):
            raise _Failed('F gives other logits without guidance')


@torch.no_grad()
def _copy_tensors(source: nn.Module, target: nn.Module) -> None:
    values = dict(source.named_parameters()) | dict(source.named_buffers())
    for tensors in (target.named_parameters(), target.named_buffers()):
        for name, tensor in tensors:
            tensor.copy_(values[name])
    for _, quantizer in named_quantizers(target):
        quantizer._restore()


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for inner in value for tensor in _flat(inner)]
