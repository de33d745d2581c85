"""The network at its real width: ``packed.safetensors``.

A file of few tensors, because a header entry for each of the 250 of a
ResNet-20 takes more room than its 2-bit weights:

* ``uint8``, ``float32``, ...: everything of the state dict that has this type,
  one after another; quantized weights are in ``uint8``, packed;
* ``layout``: JSON, compressed with zlib: ``tensors`` nests the names as the
  modules are nested; a leaf is ``[stored type, shape, type]`` or, for a
  quantized weight, ``[stored type, shape, type, bits, lowest code, stride]``.
  ``meta`` describes the network.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.layers import QuantLayer
from mmauxq.optional import need
from mmauxq.quantizers import Quantizer

from .packing import pack, unpack
from .weight_operands import weight_operands

FORMAT = 'mmauxq-packed-2'


def quantized_weights(model: nn.Module) -> dict[str, tuple[Tensor, Quantizer]]:
    """Name of a parameter -> the parameter and its quantizer."""
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer) and isinstance(
            layer.weight_quantizer, Quantizer
        ):
            weight = layer.product_weight
            key = next(k for k, p in layer._parameters.items() if p is weight)
            weights[f'{name}.{key}'] = (weight, layer.weight_quantizer)
    return weights


@torch.no_grad()
def save_packed(
    architecture: nn.Module,
    out: str | os.PathLike,
    image: Tensor,
    meta: Mapping[str, Any] | None = None,
) -> int:
    """Write F with its weights as packed integer codes.

    Args:
        architecture: Quantized, calibrated, in evaluation mode.
        out: File to write.
        image: (1, C, H, W), to see what is quantized.
        meta: What a program must know to use the network; for JSON.

    Returns:
        Its size in bytes.

    Raises:
        UsageError: If a quantizer has no integer form, or quantizes something
            else than a stored weight (a standardised or merged one).
    """
    need('safetensors')
    from safetensors.torch import save_file

    weights = quantized_weights(architecture)
    operands = weight_operands(architecture, image)
    parts: dict[str, list[Tensor]] = {}
    tree: dict[str, Any] = {}
    for name, tensor in architecture.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        leaf: list[Any] = [list(tensor.shape), _type_name(tensor)]
        path = name.split('.')
        if name in weights:
            weight, quantizer = weights[name]
            operand = operands.get('.'.join([*path[:-1], 'weight_quantizer']))
            if operand is None or not _same(operand, weight):
                raise UsageError(
                    f'{name}: what is quantized is computed from it '
                    '(a standardised or merged weight), so that its codes '
                    'cannot stand for it in packed.safetensors; keep that '
                    'layer float with policy.layers'
                )
            grid = quantizer.grid()
            leaf += [quantizer.bits, grid.qmin, grid.stride]
            tensor = torch.from_numpy(_packed(name, weight, quantizer))
        elif tensor.dtype == torch.int64 and _same(tensor, tensor.int()):
            tensor = tensor.int()  # the batch counts of batch norms
        parts.setdefault(_type_name(tensor), []).append(tensor.reshape(-1))
        place = tree
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = [_type_name(tensor), *leaf]
    layout = json.dumps(
        dict(tensors=tree, meta=dict(meta or {})), separators=(',', ':')
    )
    tensors = {name: torch.cat(values) for name, values in parts.items()}
    tensors['layout'] = torch.from_numpy(
        np.frombuffer(zlib.compress(layout.encode(), 9), np.uint8).copy()
    )
    save_file(tensors, str(out), dict(format=FORMAT))
    return Path(out).stat().st_size


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def _packed(name: str, weight: Tensor, quantizer: Quantizer) -> np.ndarray:
    grid = quantizer.grid()
    codes = quantizer.codes(weight)
    again = quantizer.weight_of(codes)
    if not torch.equal(quantizer(again), quantizer(weight)):
        raise UsageError(
            f'{name}: its codes do not give its values back; '
            f'{type(quantizer).__name__} at {quantizer.bits} bits cannot be '
            'packed'
        )
    index = (codes - grid.qmin) // grid.stride
    return pack(index.cpu().numpy(), quantizer.bits)


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix('torch.')


def _leaves(tree: dict[str, Any], prefix: str = '') -> Iterator:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f'{prefix}{name}.')
        else:
            yield prefix + name, value


@torch.no_grad()
def load_packed(
    file: str | os.PathLike, architecture: nn.Module
) -> dict[str, Any]:
    """Fill ``architecture`` from a packed file.

    Its parameters become the quantized values, or what is quantized to them:
    in evaluation the network is the one that was saved, to the bit.

    Args:
        file: Written by :func:`save_packed`.
        architecture: Quantized as the one that was saved.

    Returns:
        ``meta`` as it was given.

    Raises:
        UsageError: If the file is not a packed one, or one of another network.
    """
    state, codes, meta = read_packed(file)
    weights = quantized_weights(architecture)
    differing = codes.keys() ^ weights.keys()
    if differing:
        raise UsageError(
            f'{file}: is of another network: only one of the two quantizes '
            f'{min(differing)}'
        )
    for name, (code, bits) in codes.items():
        weight, quantizer = weights[name]
        if bits != quantizer.bits or code.shape != weight.shape:
            raise UsageError(
                f'{file}: {name}: expected {quantizer.bits} bits and shape '
                f'{list(weight.shape)}, got {bits} bits and shape '
                f'{list(code.shape)}'
            )
    own = architecture.state_dict()
    differing = state.keys() ^ (own.keys() - codes.keys()) or {
        name for name in state if own[name].shape != state[name].shape
    }
    if differing:
        raise UsageError(f'{file}: is of another network: {min(differing)}')
    architecture.load_state_dict(state, strict=False)
    for name, (weight, quantizer) in weights.items():
        weight.copy_(quantizer.weight_of(codes[name][0].to(weight.device)))
    return meta


def read_packed(
    file: str | os.PathLike,
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, int]], dict[str, Any]]:
    """What a packed file holds.

    Returns:
        The state dict without the quantized weights; (integer codes, bits) of
        these by name; ``meta``.

    Raises:
        UsageError: If the file is not a packed network.
    """
    need('safetensors')
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), 'pt') as content:
            written = (content.metadata() or {}).get('format')
            if written != FORMAT:
                raise UsageError(
                    f'{file}: expected the format {FORMAT!r}, got {written!r}'
                )
            parts = {name: content.get_tensor(name) for name in content.keys()}
    except (OSError, SafetensorError) as error:
        raise UsageError(f'{file}: cannot be read ({error})') from error
    layout = json.loads(zlib.decompress(parts.pop('layout').numpy().tobytes()))
    state, codes = {}, {}
    at = dict.fromkeys(parts, 0)
    for name, (stored, shape, kind, *grid) in _leaves(layout['tensors']):
        size = count = math.prod(shape)
        if grid:
            bits, lowest, stride = grid
            size = math.ceil(count * bits / 8)
        flat = parts[stored][at[stored] : at[stored] + size]
        at[stored] += size
        if grid:
            index = unpack(flat.numpy(), bits, count)
            code = torch.from_numpy(index).int() * stride + lowest
            codes[name] = code.reshape(shape), bits
        else:
            state[name] = flat.reshape(shape).to(getattr(torch, kind))
    return state, codes, layout['meta']
