"""Quantization-aware training of a network without a config."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from mmengine.hub import get_config
from torch import Tensor, nn

from mmauxq.errors import UsageError, unknown_name
from mmauxq.guidance import Taught
from mmauxq.log import quiet_log
from mmauxq.quantizers import scales_of
from mmauxq.registry import MODELS

from .joint_qat import JointQAT
from .plain_classifier import (
    PlainClassifier,
    as_classifier,
    copied_classifier,
)

GUIDANCE = ('aux', 'dsn', 'kd', 'auxkd', 'bwr')


def prepare(
    net: nn.Module,
    input_shape: Sequence[int],
    weight_bits: int = 4,
    activation_bits: int = 4,
    guidance: str | dict | Sequence[dict] | None = 'aux',
    loss: Callable[[Tensor, Any], Tensor] | None = None,
    teacher: nn.Module | None = None,
    quantizers: dict | None = None,
    policy: dict | None = None,
    images: Tensor | None = None,
    speed: str | dict = 'eager',
) -> JointQAT:
    """Quantize a copy of a network, and add what guides its training.

    ::

        joint = prepare(net, (3, 224, 224), 2, 2, guidance='aux')
        losses = joint.losses(images, targets)   # 'student.*', 'guidance.*'
        sum(losses.values()).backward()
        logits = joint(images)                   # the quantized network alone

    Where a wrapper hooks into the call of a module, as DDP does, the losses
    are ``wrapped(images, targets, mode='loss')``.

    Args:
        net: From images (N, C, H, W) to logits (N, K), trained in floating
            point; any module, or a classifier of MMPretrain. It is not
            changed.
        input_shape: (C, H, W) of an image.
        weight_bits, activation_bits: 1 to 8, for activations to 16; 32 is
            floating point. The first layer that runs and the last stay in
            floating point unless ``policy`` says otherwise.
        guidance: ``'aux'`` for the auxiliary module, ``'dsn'`` for
            intermediate classifiers, ``'kd'`` for distillation, ``'auxkd'``
            for the module and a teacher, ``'bwr'`` for blocks inside of a
            float network, ``None`` for none; or what ``model.guidance`` of a
            config holds.
        loss: From logits (N, K) and the targets of a batch to a loss, (); by
            default the cross entropy, and for a classifier of MMPretrain that
            of its head.
        teacher: The network that distillation learns from, on the same
            images, or that blocks are replaced in; by default ``net`` itself
            in floating point.
        quantizers, policy: As in a config; learned steps (LSQ) by default.
            Names of layers and taps may be those of ``net``.
        images: A batch (N, C, H, W) as the network takes them, which the
            scales of the quantizers are set from; by default the first that
            ``losses`` is called with, and no evaluation before that.
        speed: See :class:`JointQAT`. ``'auto'`` is for loops that call
            ``losses`` on one GPU, with all parameters from
            :func:`parameter_groups` or ``joint.parameters()``.

    Raises:
        UsageError: If the network cannot be prepared; says which part, and
            what would help.
    """
    classifier = copied_classifier(net, loss)
    recipe = _recipe(guidance)
    quantizers = copy.deepcopy(quantizers or recipe['quantizers'])
    widths = dict(weight=weight_bits, activation=activation_bits)
    for role, bits in widths.items():
        if isinstance(quantizers.get(role), dict):
            quantizers[role].setdefault('bits', bits)
    policy = copy.deepcopy(recipe['policy'] if policy is None else policy)
    guidance = copy.deepcopy(recipe['guidance'])
    parts = guidance if isinstance(guidance, (list, tuple)) else [guidance]
    if teacher is not None:
        _set_teacher(parts, teacher)
    if isinstance(classifier, PlainClassifier):
        _complete_names(policy, parts)
    joint = JointQAT(
        classifier,
        quantizers,
        policy,
        guidance,
        input_shape=input_shape,
        speed=speed,
    )
    with quiet_log():  # MMEngine tells how each parameter is initialised
        for part in joint.guidances:
            part.init_weights()
    # the weights that it starts from are those of ``net``
    joint._float_start = True
    tensors = [*net.parameters(), *net.buffers()]
    joint.to(tensors[0].device if tensors else 'cpu')
    if images is not None:
        joint.calibrate(images)
    return joint


def parameter_groups(
    joint: nn.Module, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The parameters of a network for an optimizer of torch, so that the
    scales of its quantizers do not decay.

    Args:
        joint: Of :func:`prepare`, with or without DDP.
        weight_decay: Of all other parameters.
    """
    scales = scales_of(joint)
    trained = [p for p in joint.parameters() if p.requires_grad]
    return [
        dict(
            params=[p for p in trained if p not in scales],
            weight_decay=weight_decay,
        ),
        dict(params=[p for p in trained if p in scales], weight_decay=0.0),
    ]


def _recipe(guidance: Any) -> dict[str, Any]:
    """The sections of the config fragment of this guidance."""
    if isinstance(guidance, str) and guidance not in GUIDANCE:
        raise unknown_name('guidance', guidance, GUIDANCE)
    name = guidance if isinstance(guidance, str) else 'qat'
    config = get_config(f'mmauxq::_base_/{name}_w4a4.py')
    recipe = config.quantization.to_dict()
    for quantizer in recipe['quantizers'].values():
        del quantizer['bits']
    if not isinstance(guidance, str):
        recipe['guidance'] = guidance
    return recipe


def _set_teacher(parts: Sequence[Any], teacher: nn.Module) -> None:
    taught = [
        part
        for part in parts
        if isinstance(part, dict)
        and issubclass(MODELS.get(part.get('type', '')) or object, Taught)
    ]
    if not taught:
        raise UsageError(
            'teacher: expected guidance that has one, such as guidance='
            "'kd', got a teacher beside guidance without"
        )
    for part in taught:
        part['teacher'] = as_classifier(teacher)


def _complete_names(policy: Any, parts: Sequence[Any]) -> None:
    """Let patterns of layers and taps begin at the network itself."""

    def complete(pattern: Any) -> Any:
        known = ('auto', 'stage_ends')
        if not isinstance(pattern, str) or pattern in known:
            return pattern
        return f'backbone.{pattern.removeprefix("backbone.")}'

    if isinstance(policy, dict):
        layers = dict(policy.get('layers') or {}).items()
        policy['layers'] = {complete(k): bits for k, bits in layers}
    for part in parts:
        for key in ('taps', 'teacher_taps'):
            taps = part.get(key) if isinstance(part, dict) else None
            if isinstance(taps, (list, tuple)):
                part[key] = [complete(tap) for tap in taps]
            elif taps is not None:
                part[key] = complete(taps)
