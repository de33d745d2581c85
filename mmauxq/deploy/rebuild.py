"""A quantized network from what its file says of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from mmauxq.algorithms.arguments import check_sections, check_shape
from mmauxq.algorithms.build import quantize
from mmauxq.algorithms.plain_classifier import (
    PlainClassifier,
    copied_classifier,
)
from mmauxq.engine.config_validation import own_names
from mmauxq.errors import UsageError, one_line, shorten
from mmauxq.network import profile
from mmauxq.network.checkpoint import (
    check_architecture,
    check_same_bits,
    check_scales,
)

PARTS = (
    'mmpretrain.models.backbones.',
    'mmpretrain.models.classifiers.image',
    'mmpretrain.models.heads.',
    'mmpretrain.models.losses.',
    'mmpretrain.models.necks.',
    'mmpretrain.models.utils.',
    'mmauxq.backbones.',
    'mmcv.cnn.',
    'torch.nn.',
)
"""Modules whose classes a file may name."""
LOADERS = ('timm_backbone', 'huggingface')
"""Of these, those whose classes read or run something else."""
STARTS = ('init_cfg', 'pretrained', 'checkpoint')
"""Arguments that name a file to start from; the weights are in the file."""
LARGEST = 2**17
"""Of the numbers that build a network."""


def rebuild(
    description: Any,
    state: dict[str, Tensor],
    network: nn.Module | None,
    source: str,
) -> ImageClassifier:
    """The float network of a file, quantized as it was; without its weights.

    Args:
        description: That of :class:`mmauxq.algorithms.JointQAT`, as it was
            read.
        state: The state dict of the file, which bounds what is built.
        network: The float network, which is copied; by default the one that
            ``description`` names, if it is one of MMPretrain.
        source: Name of the file, for messages.

    Raises:
        UsageError: If the description is none, or names anything but parts
            of networks.
    """
    keys = {'quantizers', 'policy', 'input_shape'}
    if not isinstance(description, dict) or not keys <= description.keys():
        raise UsageError(
            f'{source}: expected a description of the network, got '
            f'{shorten(description, 60)}; it was written by an earlier '
            'version: write it again from the training checkpoint'
        )
    quantizers, policy = description['quantizers'], description['policy']
    architecture = description.get('architecture')
    try:
        check_sections(architecture or {}, quantizers, policy, None)
        for section in quantizers.values():
            if section.get('type') not in own_names():
                raise UsageError(
                    'expected a quantizer of mmauxq, got '
                    f'{shorten(section.get("type"))}'
                )
        shape = check_shape(description['input_shape'])
        if network is not None:
            classifier = copied_classifier(network)
        else:
            classifier = _from_architecture(architecture, state)
        found = profile(classifier, shape)
        quantize(classifier, found, quantizers, policy)
    except Exception as error:  # a network may fail in any way
        raise UsageError(f'{source}: {one_line(error)}') from error
    return classifier.eval()


def fill(
    classifier: ImageClassifier, state: dict, meta: Any, source: str
) -> None:
    """Load the state dict of a file, or raise a UsageError if it is not one of
    this quantized network, trained and calibrated."""
    if isinstance(classifier, PlainClassifier):
        state = {f'backbone.{key}': value for key, value in state.items()}
    check_architecture(classifier, state, source)
    check_scales(classifier, state, source)
    check_same_bits(classifier, meta, source)
    classifier.load_state_dict(state, strict=False)


def _from_architecture(config: Any, state: dict) -> ImageClassifier:
    if config is None:
        raise UsageError(
            'expected the float network as the second argument, since the '
            'file holds none of MMPretrain'
        )
    config = _checked(config)
    config['_scope_'] = 'mmpretrain'
    with _bounded(state):
        network = MMPRETRAIN_MODELS.build(config)
    if not isinstance(network, ImageClassifier):
        raise UsageError(
            f'expected an ImageClassifier, got a {type(network).__name__}'
        )
    return network


def _checked(value: Any, place: str = 'architecture') -> Any:
    """A part of the config of a network, if all it does is to build one."""
    if isinstance(value, dict):
        kind = value.get('type')
        if kind is not None and not _is_part(kind):
            raise UsageError(
                f'{place}.type: expected a part of a network of MMPretrain, '
                f'got {shorten(kind)}; give the float network as the second '
                'argument'
            )
        return {
            key: _checked(inner, f'{place}.{key}')
            for key, inner in value.items()
            if key not in (*STARTS, '_scope_')
        }
    if isinstance(value, (list, tuple)):
        return [_checked(v, f'{place}.{i}') for i, v in enumerate(value)]
    number = isinstance(value, (int, float))
    if number and not abs(value) <= LARGEST:
        raise UsageError(
            f'{place}: expected a number up to {LARGEST}, got {value}'
        )
    return value


def _is_part(kind: Any) -> bool:
    if not isinstance(kind, str):
        return False
    scope, _, name = kind.rpartition('.')
    if scope == 'mmauxq':
        cls = own_names().get(kind)
    else:
        registries = [MMPRETRAIN_MODELS]
        while registries[-1].parent is not None:
            registries.append(registries[-1].parent)
        for registry in registries:
            registry.import_from_location()
        tables = [registry.module_dict for registry in registries]
        cls = next((t[name] for t in tables if name in t), None)
        if scope not in ('', 'mmpretrain', 'mmcv', 'mmengine', 'torch'):
            return False
    module = getattr(cls, '__module__', '')
    return module.startswith(PARTS) and not any(n in module for n in LOADERS)


@contextmanager
def _bounded(state: dict[str, Tensor]) -> Iterator[None]:
    """While active, no more is built than a state dict can be one of.

    Parameters are registered before they are filled, so that a claimed size
    takes no memory.
    """
    modules = 1000 + 20 * len(state)
    numbers = 2**20 + 2 * sum(tensor.numel() for tensor in state.values())
    left = dict(modules=modules, numbers=numbers)

    def take(kind: str, count: int) -> None:
        left[kind] -= count
        if left[kind] < 0:
            raise UsageError(
                f'architecture: expected a network of the {len(state)} '
                'tensors in the file, got a larger one'
            )

    def on_module(parent: nn.Module, name: str, child: Any) -> None:
        take('modules', 1)

    def on_tensor(parent: nn.Module, name: str, tensor: Any) -> None:
        take('numbers', 0 if tensor is None else tensor.numel())

    with (
        torch_module.register_module_module_registration_hook(on_module),
        torch_module.register_module_parameter_registration_hook(on_tensor),
        torch_module.register_module_buffer_registration_hook(on_tensor),
    ):
        yield
