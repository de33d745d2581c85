"""From the config of JointQAT to bits, layers, guidance and log lines."""

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.model import BaseModel, ModuleList
from mmpretrain.models import MultiLabelClsHead
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmauxq.errors import UsageError
from mmauxq.guidance import Guidance, Tap, Taps, find_taps
from mmauxq.guidance.taps import IMAGE
from mmauxq.layers import LayerBits, Policy, convert, restore
from mmauxq.log import log, warn
from mmauxq.network import (
    NetworkProfile,
    TrainingPass,
    forked_generators,
    probing,
)
from mmauxq.network.profile import count_parameters, unreached_layers
from mmauxq.quantizers import FLOAT_BITS, named_quantizers
from mmauxq.quantizers.base import ROLES, check_bits
from mmauxq.registry import MODELS

from .arguments import check_taps
from .head_loss import check_for_several_labels, check_task_loss

LOW_BITS = 4
SPEEDS = (None, 'auto', 'eager')


def build_architecture(
    architecture: dict | BaseModel, data_preprocessor: Any
) -> BaseModel:
    """A classifier of mmpretrain from its config, if it is not built yet.

    Raises:
        UsageError: If it has no backbone or no head.
    """
    if isinstance(architecture, dict):
        architecture = dict(architecture)
        # that of this package marks what was inherited from its configs
        if architecture.get('_scope_') in (None, 'mmauxq'):
            architecture['_scope_'] = 'mmpretrain'
        if data_preprocessor is not None:
            architecture.setdefault('data_preprocessor', data_preprocessor)
        architecture = MMPRETRAIN_MODELS.build(architecture)
    missing = [
        part
        for part in ('backbone', 'head')
        if not isinstance(getattr(architecture, part, None), nn.Module)
    ]
    if missing:
        raise UsageError(
            'architecture: expected an mmpretrain image classifier with '
            f'backbone and head, got a {type(architecture).__name__} without '
            f'{" and ".join(missing)}'
        )
    return architecture


@dataclass
class Cost:
    """Size and work at ``shape`` (C, H, W), for one image.

    That of the guidance is the sum over all guidances, with what they use and
    do not train, such as a teacher.
    """

    shape: tuple[int, ...]
    num_classes: int
    parameters: int
    multiply_adds: int
    guidance_parameters: int = 0
    guidance_multiply_adds: int = 0

    @classmethod
    def of(cls, found: NetworkProfile) -> 'Cost':
        """That of a float network; logged."""
        cost = cls(
            found.shape,
            found.num_classes,
            found.parameters,
            found.multiply_adds,
        )
        _log(
            f'F has {with_unit(cost.parameters)} parameters, '
            f'{with_unit(cost.multiply_adds)} multiply-adds at {cost.shape}'
        )
        return cost

    def add(self, name: str, parameters: int, multiply_adds: int) -> None:
        """Add that of a guidance; logged."""
        self.guidance_parameters += parameters
        self.guidance_multiply_adds += multiply_adds
        _log(
            f'{name} has {with_unit(parameters)} parameters '
            f'(+{parameters / self.parameters:.1%}), '
            f'{with_unit(multiply_adds)} multiply-adds '
            f'(+{multiply_adds / self.multiply_adds:.1%}) at {self.shape}, '
            'in training only'
        )


def with_unit(count: int) -> str:
    """A count for people: ``'640'``, ``'623.10 k'``, ``'1.81 G'``."""
    for unit, size in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if count >= size:
            return f'{count / size:.2f} {unit}'
    return str(count)


def _log(text: str) -> None:
    log(f'JointQAT: {text}')


def accelerated_step(model: Any, speed: Any) -> Any:
    """A faster form of the training step of ``model``.

    Args:
        model: Whose step it is.
        speed: ``None`` or ``'auto'`` for what a GPU allows, ``'eager'`` for
            the step as it is written, or the options of
            :class:`mmauxq.accelerate.Speed`.

    Returns:
        A :class:`mmauxq.accelerate.AcceleratedStep`; ``None`` for the step as
        it is written.

    Raises:
        UsageError: If ``speed`` is none of these.
    """
    if isinstance(speed, str) and speed not in SPEEDS:
        raise UsageError(
            f"model.speed: expected 'auto', 'eager' or a dict, got {speed!r}"
        )
    plain = speed == 'eager' or (
        speed in SPEEDS and not torch.cuda.is_available()
    )
    if plain and 'MMAUXQ_OPS' not in os.environ:
        return None
    from mmauxq.accelerate import accelerate

    return None if speed == 'eager' else accelerate(model, speed)


# --- guidance ----------------------------------------------------------------


def build_guidance(
    model: Any, config: dict | Sequence[dict], found: NetworkProfile
) -> nn.Module:
    """The guidance of ``model``, one module or a list of them.

    Args:
        model: With the float architecture. Taps, recorders and cost are added
            to it.
        config: That of a guidance, or a list of such.
        found: Profile of the architecture.

    Raises:
        UsageError: If a config asks for something that does not exist.
    """
    check_task_loss(model.architecture.head)
    several = isinstance(config, (list, tuple))
    run = TrainingPass(model.architecture, found.images)
    # F starts from the same weights whatever guides it
    with forked_generators(model):
        built = [
            _build_guidance(model, cfg, found, run)
            for cfg in (config if several else [config])
        ]
    givers = sum(guidance.gives_aux_logits for guidance in built)
    if givers > 1:
        raise UsageError(
            f'guidance: expected at most one auxiliary module, got {givers}'
        )
    for guidance in built:
        if guidance.needs_aux_logits and not givers:
            raise UsageError(
                'guidance.guides_aux: expected an auxiliary module beside a '
                f'{type(guidance).__name__}; put a '
                'mmauxq.AuxAdaptorAggregator into the list'
            )
    return ModuleList(built) if several else built[0]


def _build_guidance(
    model: Any, cfg: dict, found: NetworkProfile, run: TrainingPass
) -> Guidance:
    cfg, network = dict(cfg), model.architecture
    kind = cfg.get('type')
    cls = MODELS.get(kind) if isinstance(kind, str) else kind
    if not (isinstance(cls, type) and issubclass(cls, Guidance)):
        raise UsageError(
            'guidance.type: expected mmauxq.AuxAdaptorAggregator, '
            'mmauxq.BlockReplacement, mmauxq.IntermediateClassifiers or '
            f'mmauxq.KnowledgeDistillation, got {kind!r}'
        )
    places = Taps()
    taps = cfg.pop('taps', cls.default_taps(cfg))
    if taps is not None:
        check_taps(taps)
        places = find_taps(run, taps, cls.uses_stem)
    given = dict(taps=places.taps, num_classes=found.num_classes)
    if cls.uses_image:
        given.update(
            taps=[Tap(IMAGE, found.shape), *places.taps],
            network=network,
            data_preprocessor=model.data_preprocessor,
        )
    guidance = MODELS.build(cfg, default_args=given)
    if isinstance(network.head, MultiLabelClsHead):
        check_for_several_labels(guidance, found.num_classes)
    model.recorders.append(guidance.attach(network, places.recorder(network)))
    model.taps += places.taps
    model.cost.add(
        cls.__name__,
        count_parameters(guidance),
        _multiply_adds(guidance, places.taps, network, found),
    )
    if places.taps:
        _log(f'taps {", ".join(tap.name for tap in places.taps)}')
    return guidance


def _multiply_adds(
    guidance: Guidance,
    taps: Sequence[Tap],
    network: nn.Module,
    found: NetworkProfile,
) -> int:
    """Multiply-adds of the guidance's forward pass for one image."""
    images = found.images
    outputs = {
        tap.name: torch.zeros(len(images), *tap.shape, device=images.device)
        for tap in taps
    }
    outputs[IMAGE] = images
    with (
        probing(guidance, network),
        ExitStack() as stack,
        FlopCounterMode(display=False) as counter,
    ):
        for recorder in guidance.recorders:
            stack.enter_context(recorder)
        guidance(outputs)
    return counter.get_total_flops() // 2 // len(images)


# --- quantization ------------------------------------------------------------


def quantize(
    network: nn.Module,
    found: NetworkProfile,
    quantizers: dict,
    policy: dict | None,
) -> dict[str, LayerBits]:
    """Quantize the layers of a float network in place.

    Args:
        network: Changed in place.
        found: Its profile.
        quantizers: Configs of the quantizers of weights and activations.
        policy: Arguments of :class:`mmauxq.layers.Policy`.

    Returns:
        Name of a layer -> its bits, in the order of running. Layers that stay
        in floating point have a reason.

    Raises:
        UsageError: If there is no layer to quantize, or ``quantizers`` or
            ``policy`` ask for something that does not exist.
    """
    if not found.layers:
        raise UsageError(
            'architecture: expected a convolution or linear layer that runs, '
            'got none'
        )
    bits = assign_bits(found, quantizers, policy)
    convert(
        network,
        bits,
        quantizers['weight'],
        quantizers['activation'],
        found.layers,
    )
    unreached = unreached_layers(network, found.images)
    if unreached:
        restore(network, unreached)
    for name in unreached:
        bits[name] = LayerBits(
            FLOAT_BITS, FLOAT_BITS, 'its product was not found'
        )
    return bits


def assign_bits(
    found: NetworkProfile, quantizers: dict, policy: dict | None
) -> dict[str, LayerBits]:
    """Bits of every layer, by its name: by policy, and float where it must be.

    Raises:
        UsageError: If quantizers or policy ask for what does not exist.
    """
    widths = [
        check_bits(quantizers[role]['bits'], f'model.quantizers.{role}', role)
        for role in ROLES
    ]
    policy = {k: v for k, v in (policy or {}).items() if k != '_scope_'}
    bits = Policy(**policy).assign(list(found.layers), *widths)
    reasons = {u.name: u.reason for u in found.layers.values() if u.reason}
    reasons |= {name: 'does not run in evaluation' for name in found.unused}
    for name, reason in reasons.items():
        bits[name] = LayerBits(FLOAT_BITS, FLOAT_BITS, reason)
    return bits


def log_bits(bits: dict[str, LayerBits]) -> None:
    """Tell how many layers have which bits, and which stay float and why."""
    kept = [
        f'{name} ({layer.reason or "bits"})'
        for name, layer in bits.items()
        if layer.is_float
    ]
    widths = Counter(
        (layer.weight, layer.activation)
        for layer in bits.values()
        if not layer.is_float
    )
    counts = ', '.join(
        f'{count} layers at W{w}A{a}'
        for (w, a), count in sorted(widths.items())
    )
    _log(
        f'{counts or "no layer quantized"}; {len(kept)} float: '
        f'{", ".join(kept) or "none"}'
    )


def warn_without_float_start(network: nn.Module) -> None:
    """Warn if a network of 4 bits or less starts from random weights."""
    bits = min((q.bits for _, q in named_quantizers(network)), default=32)
    pretrained = any(
        isinstance(init, dict) and init.get('type') == 'Pretrained'
        for module in (network, network.backbone)
        for init in _as_list(getattr(module, 'init_cfg', None))
    )
    if bits <= LOW_BITS and not pretrained:
        warn(
            f'JointQAT: starting {bits}-bit training WITHOUT A FLOAT '
            'CHECKPOINT. Low-bit networks trained from random weights end '
            'well below those that start from a trained float network: set '
            'model.float_checkpoint (or load_from)'
        )


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]
