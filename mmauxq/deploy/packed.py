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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmauxq.analysis import quantized_weights
from mmauxq.errors import UsageError
from mmauxq.forward_hooks import forward_hooks
from mmauxq.optional import need
from mmauxq.quantizers import Quantizer, named_quantizers

FORMAT = 'mmauxq-packed-2'


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes 0 to ``2**bits - 1`` in C order, side by side, lowest bit first:
    uint8, shape (ceil(number of codes * bits / 8),), padded with zeros."""
    if codes.size and not 0 <= codes.min() <= codes.max() < 2**bits:
        raise UsageError(
            f'pack: {bits} bits: expected codes from 0 to {2**bits - 1}, got '
            f'{codes.min()} to {codes.max()}'
        )
    rows = codes.reshape(-1, 1).astype(np.uint8)
    single = np.unpackbits(rows, axis=1, count=bits, bitorder='little')
    return np.packbits(single, bitorder='little')


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The ``count`` codes (uint8) that :func:`pack` was given."""
    size = math.ceil(count * bits / 8)
    if len(packed) != size:
        raise UsageError(
            f'unpack: {count} codes of {bits} bits: expected {size} bytes, '
            f'got {len(packed)}'
        )
    single = np.unpackbits(packed, count=count * bits, bitorder='little')
    rows = single.reshape(count, bits)
    return np.packbits(rows, axis=1, bitorder='little')[:, 0]


@torch.no_grad()
def weight_operands(
    architecture: nn.Module, image: Tensor
) -> dict[str, Tensor]:
    """What reaches each weight quantizer in a forward pass."""
    operands: dict[str, Tensor] = {}
    pairs = named_quantizers(architecture)
    weights = [(name, q) for name, q in pairs if q.role == 'weight']
    with forward_hooks(weights, lambda n, _, x, y: operands.update({n: x})):
        architecture(image, mode='tensor')
    return operands


@torch.no_grad()
def save_packed(
    architecture: nn.Module,
    out: str | os.PathLike,
    image: Tensor,
    meta: dict[str, Any] | None = None,
) -> int:
    """Write F with its weights as packed integer codes; the size in bytes.

    Args:
        architecture: Quantized, calibrated, in evaluation mode.
        out: File to write.
        image: (1, C, H, W), to see what is quantized.
        meta: Anything that JSON holds.

    Raises:
        UsageError: If a quantizer has no integer form, or quantizes what is
            computed from a weight.
    """
    need('safetensors')
    from safetensors.torch import save_file

    weights = quantized_weights(architecture)
    operands = weight_operands(architecture, image)
    parts: dict[str, list[Tensor]] = {}
    tree: dict[str, Any] = {}
    for name, tensor in architecture.state_dict().items():
        tensor = tensor.cpu()
        leaf: list[Any] = [list(tensor.shape), _type_name(tensor)]
        path = name.split('.')
        if name in weights:
            weight, quantizer = weights[name]
            operand = operands.get('.'.join([*path[:-1], 'weight_quantizer']))
            if operand is None or not torch.equal(operand, weight):
                raise UsageError(
                    f'{name}: what is quantized is computed from it '
                    '(a standardised or merged weight), so that its codes '
                    'cannot stand for it in packed.safetensors; keep that '
                    'layer float with policy.layers'
                )
            grid = quantizer.grid()
            leaf += [quantizer.bits, grid.qmin, grid.stride]
            tensor = _packed(name, weight, quantizer)
        elif tensor.dtype == torch.int64 and not (tensor - tensor.int()).any():
            tensor = tensor.int()  # the batch counts of batch norms
        parts.setdefault(_type_name(tensor), []).append(tensor.reshape(-1))
        place = tree
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = [_type_name(tensor), *leaf]
    layout = json.dumps(
        dict(tensors=tree, meta=meta or {}), separators=(',', ':')
    )
    tensors = {name: torch.cat(values) for name, values in parts.items()}
    tensors['layout'] = torch.from_numpy(
        np.frombuffer(zlib.compress(layout.encode(), 9), np.uint8).copy()
    )
    save_file(tensors, str(out), dict(format=FORMAT))
    return Path(out).stat().st_size


def _packed(name: str, weight: Tensor, quantizer: Quantizer) -> Tensor:
    grid, codes = quantizer.grid(), quantizer.codes(weight)
    again = quantizer.weight_of(codes)
    if not torch.equal(quantizer(again), quantizer(weight)):
        raise UsageError(
            f'{name}: its codes do not give its values back; '
            f'{type(quantizer).__name__} at {quantizer.bits} bits cannot be '
            'packed'
        )
    index = (codes - grid.qmin) // grid.stride
    return torch.from_numpy(pack(index.numpy(force=True), quantizer.bits))


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
    """Fill ``architecture`` from a packed file; its ``meta``.

    Parameters become the quantized values, or what is quantized to them: in
    evaluation the network is the one that was saved, to the bit.

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
    """The state dict of a packed file without the quantized weights; (integer
    codes, bits) of these by name; ``meta``.

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
    for name, (stored, shape, kind, *grid) in _leaves(layout['tensors']):
        count = math.prod(shape)
        size = math.ceil(count * grid[0] / 8) if grid else count
        flat, parts[stored] = parts[stored][:size], parts[stored][size:]
        if grid:
            bits, lowest, stride = grid
            index = unpack(flat.numpy(), bits, count)
            code = torch.from_numpy(index).int() * stride + lowest
            codes[name] = code.reshape(shape), bits
        else:
            state[name] = flat.reshape(shape).to(getattr(torch, kind))
    return state, codes, layout['meta']
