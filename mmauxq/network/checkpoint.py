"""Whether a state dict belongs to an architecture."""

import copy
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mmauxq.errors import UsageError, shorten
from mmauxq.log import warn
from mmauxq.quantizers import Quantizer, named_quantizers


def is_joint(state: Iterable[str]) -> bool:
    """Whether these are keys of a JointQAT, with or without DDP."""
    return any(
        key.removeprefix('module.').startswith('architecture.')
        for key in state
    )


def normalise(checkpoint: Any, source: str) -> dict[str, Tensor]:
    """The state dict of F in a float, slim or training checkpoint, or a
    UsageError if there is none."""
    state = checkpoint
    if isinstance(checkpoint, dict):
        state = checkpoint.get('state_dict', checkpoint)
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise UsageError(f'{source}: holds no state dict of tensors')
    prefix = 'architecture.' if is_joint(state) else ''
    state = {key.removeprefix('module.'): v for key, v in state.items()}
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix)
    }


def meta_of(checkpoint: Any) -> dict:
    """The meta of a checkpoint with a state dict; empty if it has none."""
    meta = checkpoint.get('meta')
    return meta if isinstance(meta, dict) else {}


def check_architecture(
    architecture: nn.Module,
    state: dict[str, Tensor],
    source: str,
    other_head: bool = False,
) -> dict[str, Tensor]:
    """``state``, if it is one of ``architecture``, quantized or not.

    Quantizer state may be missing, as it is in a float checkpoint.

    Args:
        source: Name of the checkpoint, for messages.
        other_head: Whether the head may be missing, as in a checkpoint of
            self-supervised training, or have another shape, as for another
            number of classes; it is left out then.

    Raises:
        UsageError: If parameters are missing, differ in shape or type, or
            have values that no training gives.
    """
    state = dict(state)
    seen = _as_loaded(architecture, state)
    modules = architecture.named_modules()
    quantizers = tuple(f'{n}.' for n, m in modules if isinstance(m, Quantizer))
    positive = {f'{n}.{q.scale}' for n, q in named_quantizers(architecture)}
    problems: dict[str, str] = {}
    other_types = False
    own = architecture.state_dict()
    missing = [
        k for k in own if k not in seen and not k.startswith(quantizers)
    ]
    if missing:  # or made anew by modules that drop them while loading
        stay = _as_loaded(architecture, own)
        problems = {k: f'{k} is missing' for k in missing if k in stay}
    for key, value in own.items():
        got = seen.get(key)
        if got is None:
            continue
        if got.shape != value.shape:
            shapes = f'{tuple(value.shape)}, got {tuple(got.shape)}'
            problems[key] = f'{key}: expected shape {shapes}'
        elif got.is_floating_point() != value.is_floating_point():
            types = f'{value.dtype}, got {got.dtype}'
            problems[key] = f'{key}: expected {types}'
            other_types = True
        else:
            check_values(key, got, key in positive, source)
    heads = [key.startswith('head.') for key in problems]
    only_head = all(heads) and not other_types
    if only_head and other_head:
        for key, problem in problems.items():
            state.pop(key, None)
            warn(f'{source}: {problem}; it starts from random weights')
    elif problems:
        name = type(getattr(architecture, 'backbone', architecture)).__name__
        first, *others = problems.values()
        raise UsageError(
            f'{source}: expected a checkpoint of this architecture ({name}), '
            f'got one of another: {first}'
            + (f', and {len(others)} more' if others else '')
            + ('; model.float_checkpoint takes a float checkpoint with '
               'another head' if only_head else '')
        )  # fmt: skip
    _warn_of_extra(architecture, seen, source)
    return state


def _warn_of_extra(
    architecture: nn.Module, state: dict[str, Tensor], source: str
) -> None:
    """A checkpoint of a deeper network has everything that a shallower one
    needs, and some pre-training leaves entries that nobody needs."""
    known = architecture.state_dict().keys()
    extra = [
        key
        for key in state
        if key.startswith('backbone.')
        and '_quantizer.' not in key
        and key not in known
    ]
    if extra:
        warn(
            f'{source}: {len(extra)} entries are left out, because this '
            f'architecture has no place for them, such as {extra[0]}; is it '
            'the checkpoint of a deeper network?'
        )


def check_values(key: str, value: Tensor, positive: bool, source: str) -> None:
    """Raise a UsageError if a tensor of a state dict holds what no training
    gives: NaN, infinity, negative variances, steps that are not positive.

    Args:
        key: In the state dict.
        value: Any shape.
        positive: Whether it is the step of a quantizer.
        source: Name of the file, for the message.
    """
    expected = None
    if not value.isfinite().all():
        expected, got = 'finite numbers', 'NaN or infinity'
    elif positive and not (value > 0).all():
        expected, got = 'steps above 0', f'{value.min().item():g}'
    elif key.endswith('running_var') and (value < 0).any():
        expected, got = 'variances from 0', f'{value.min().item():g}'
    if expected:
        raise UsageError(f'{source}: {key}: expected {expected}, got {got}')


def bits_of(architecture: nn.Module) -> dict[str, int]:
    """Name -> bits of all quantizers, for the meta of a checkpoint."""
    return {name: q.bits for name, q in named_quantizers(architecture)}


def check_same_bits(architecture: nn.Module, meta: Any, source: str) -> None:
    """Raise a UsageError if a checkpoint was trained with other bits.

    Args:
        architecture: Of the config.
        meta: Of the checkpoint; one without ``quantizer_bits`` passes.
        source: Its name, for the message.
    """
    stored = meta.get('quantizer_bits') if isinstance(meta, dict) else None
    if not isinstance(stored, dict):
        return
    own = bits_of(architecture)
    for name in own.keys() & stored.keys():
        if own[name] != stored[name]:
            raise UsageError(
                f'{source}: {name}: expected {own[name]} bits, as the config '
                f'says, got {shorten(stored[name])}; use the config that it '
                'was trained with'
            )


def _as_loaded(
    architecture: nn.Module, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """``state`` with the keys and shapes that loading would end up with.

    Modules rename and resize entries as they load, such as position
    embeddings; here on a copy of the architecture without data.
    """
    memo: dict[int, Any] = {}
    for module in architecture.modules():
        if isinstance(module, Quantizer):
            continue  # its state is small, and read while loading
        for parameter in module.parameters(recurse=False):
            empty = nn.Parameter(parameter.to('meta'), parameter.requires_grad)
            memo[id(parameter)] = empty
        for buffer in module.buffers(recurse=False):
            memo[id(buffer)] = buffer.to('meta')
    shadow = copy.deepcopy(architecture, memo)
    seen = dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # nothing is copied to "meta"
        for name, module in shadow.named_modules():
            prefix = f'{name}.' if name else ''
            module._load_from_state_dict(seen, prefix, {}, False, [], [], [])
    return seen


def check_scales(
    architecture: nn.Module, state: dict[str, Tensor], source: str
) -> None:
    """Raise a UsageError unless ``source``, with this ``state``, and the
    architecture quantize the same layers, all calibrated."""
    quantizers = [name for name, _ in named_quantizers(architecture)]
    scales = [key for key in state if '_quantizer.' in key]
    if quantizers and not scales:
        raise UsageError(
            f'{source}: expected a quantized network, got a float one, '
            f'without scales for {len(quantizers)} quantizers; train from it '
            f'with model.float_checkpoint={source}, or test it with the '
            'config of the float network'
        )
    if scales and not quantizers:
        raise UsageError(
            f'{source}: expected a float network, got a quantized one, with '
            f'{scales[0]}; test it with the config that it was trained with'
        )
    missing = [n for n in quantizers if not state.get(f'{n}.calibrated')]
    if missing:
        raise UsageError(
            f'{source}: {len(missing)} quantizers have no calibrated scale, '
            f'such as {missing[0]}; train the quantized network first'
        )
    known = architecture.state_dict().keys()
    unexpected = [key for key in scales if key not in known]
    if unexpected:
        raise UsageError(
            f'{source}: quantizes more than this config: {unexpected[0]}'
        )
