"""The package without configs: what ``import mmauxq`` gives."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .algorithms import JointQAT
from .algorithms.plain_classifier import as_classifier, bare_network
from .algorithms.prepare import parameter_groups, prepare
from .analysis import LevelCount, count_levels
from .checkpoint_file import read_checkpoint
from .deploy.packed import fill_packed, read_packed, write_packed
from .deploy.rebuild import fill, rebuild
from .deploy.slim import write_slim
from .errors import UsageError
from .files import write_atomically
from .network import sample_images
from .network.checkpoint import bits_of, meta_of, normalise
from .quantizers import (
    keep_positive,
    learned_scales,
    named_quantizers,
    uncalibrated,
)

__all__ = [
    'audit',
    'export_onnx',
    'load_packed',
    'load_slim',
    'parameter_groups',
    'prepare',
    'save_packed',
    'save_slim',
]


def save_slim(
    joint: JointQAT,
    file: str | os.PathLike,
    classes: Sequence[str] | None = None,
) -> int:
    """Write the quantized network alone; the size of the file in bytes.

    Any ``torch.load(..., weights_only=True)`` reads the result. The names in
    its state dict are those of the network that was prepared.

    Args:
        joint: Of :func:`prepare`, trained.
        file: To write; complete or absent, never half-written.
        classes: Names of the classes.

    Raises:
        UsageError: If ``joint`` is no such network, or was not trained.
    """
    _check_trained(joint)
    network = bare_network(joint.architecture)
    meta: dict[str, Any] = dict(
        quantizer_bits=bits_of(joint.architecture),
        description=joint.description,
    )
    if classes is not None:
        meta['dataset_meta'] = dict(classes=list(map(str, classes)))
    return write_slim(file, network.state_dict(), meta)


def load_slim(
    file: str | os.PathLike, float_net: nn.Module | None = None
) -> nn.Module:
    """The quantized network of a slim file, in evaluation mode.

    Args:
        file: Of :func:`save_slim`, of ``mmauxq train``, or a training
            checkpoint.
        float_net: The network before it was prepared, whose weights do not
            count; it is not changed. Not needed for classifiers of MMPretrain.

    Returns:
        Of the class of ``float_net``. One of MMPretrain has the names of the
        classes in ``_dataset_meta``, where its inferencers look for them.

    Raises:
        UsageError: If the file is none, is damaged, or is one of another
            network.
    """
    content = read_checkpoint(file)
    state, source = normalise(content, str(file)), str(file)
    meta = meta_of(content)
    description = meta.get('description')
    classifier = rebuild(description, state, float_net, source)
    fill(classifier, state, meta, source)
    names = meta.get('dataset_meta')
    return _ready(classifier, description, names)


def save_packed(joint: JointQAT, file: str | os.PathLike) -> int:
    """Write the quantized network with its weights as integer codes at their
    bits, in the safetensors format; the size of the file in bytes.

    Args:
        joint: Of :func:`prepare`, trained.
        file: To write; complete or absent, never half-written.

    Raises:
        UsageError: If ``joint`` is no such network or was not trained, or a
            quantizer has no integer form.
    """
    _check_trained(joint)
    network = joint.architecture.eval()
    image = sample_images(network, joint.cost.shape)
    meta = dict(description=joint.description)
    return write_packed(network, file, image, meta)


def load_packed(
    file: str | os.PathLike, float_net: nn.Module | None = None
) -> nn.Module:
    """The quantized network of a packed file, in evaluation mode.

    Args:
        file: Of :func:`save_packed` or ``mmauxq export``.
        float_net: See :func:`load_slim`.

    Returns:
        Of the class of ``float_net``; it gives the logits of the network that
        was written, to the bit.

    Raises:
        UsageError: If the file is none, is damaged, or is one of another
            network.
    """
    state, codes, meta = read_packed(file)
    shapes = state | {name: code for name, (code, _) in codes.items()}
    description = meta.get('description')
    classifier = rebuild(description, shapes, float_net, str(file))
    fill_packed(file, classifier)
    classes = meta.get('classes')
    return _ready(classifier, description, dict(classes=classes))


def audit(net: nn.Module, images: Tensor) -> list[LevelCount]:
    """Count the distinct values of every quantized tensor.

    Args:
        net: Of :func:`prepare`, :func:`load_slim` or :func:`load_packed`, in
            evaluation mode.
        images: (N, C, H, W), as the network takes them.

    Returns:
        ``name``, ``bits``, ``levels`` and ``holds``, whether there are at most
        ``2**bits`` values, for each quantizer.
    """
    return count_levels(_evaluated(net, 'audit'), images)


def export_onnx(
    net: nn.Module,
    file: str | os.PathLike,
    images: Tensor,
    weights: str = 'typed',
) -> Any:
    """Write the quantized network as an ONNX model that was compared with it.

    Args:
        net: Of :func:`prepare`, :func:`load_slim` or :func:`load_packed`, in
            evaluation mode.
        file: To write; complete or absent, never half-written.
        images: (N, C, H, W), as the network takes them, to compare on; the
            model takes any number of such images, that of QONNX one.
        weights: ``'typed'``, the narrowest types that hold the codes, or
            ``'int8'``, the form for integer kernels, or ``'qonnx'``, a
            ``Quant`` node for each quantizer.

    Returns:
        A :class:`mmauxq.deploy.onnx.verify.Agreement`.

    Raises:
        UsageError: If the network cannot be exported, or computes something
            else in ONNX Runtime, or in the executor of the package qonnx.
    """
    from .deploy.onnx.export import check, lower
    from .deploy.onnx.graph import add_metadata

    classifier = _evaluated(net, 'export_onnx')
    images = images.detach().float().cpu()
    lowered, _ = lower(classifier, images[:250], weights, 'float', print)
    add_metadata(lowered, classifier, {})
    labels = torch.full((len(images),), -1)
    pairs = zip(images.split(250), labels.split(250), strict=True)
    agreement = check(classifier, lowered, 'float', list(pairs), _silent)
    write_atomically(file, lowered.model.SerializeToString())
    return agreement


def _silent(line: str) -> None:
    """Takes a line for nobody."""


def _check_trained(joint: Any) -> None:
    if not isinstance(joint, JointQAT):
        raise UsageError(
            'joint: expected what mmauxq.prepare returns, got a '
            f'{type(joint).__name__}'
        )
    waiting = uncalibrated(joint.architecture)
    if waiting:
        raise UsageError(
            f'joint: expected a trained network, got {len(waiting)} '
            'quantizers without a scale; call joint.losses on a batch first'
        )
    keep_positive(learned_scales(joint.architecture))


def _evaluated(net: nn.Module, what: str) -> nn.Module:
    """The classifier of a quantized network, on the CPU."""
    if isinstance(net, JointQAT):
        _check_trained(net)
        net = net.architecture
    if not isinstance(net, nn.Module) or not any(named_quantizers(net)):
        raise UsageError(
            f'{what}: expected a quantized network, as mmauxq.prepare or '
            f'mmauxq.load_slim give it, got a {type(net).__name__}'
        )
    if net.training:
        raise UsageError(
            f'{what}: expected a network in evaluation mode, got one in '
            'training mode; call its eval() first'
        )
    return as_classifier(net).cpu().eval()


def _ready(classifier: nn.Module, description: dict, meta: Any) -> nn.Module:
    network = bare_network(classifier)
    if network is classifier and isinstance(meta, dict):
        network._dataset_meta = meta  # for MMPretrain's inferencers
    return network
