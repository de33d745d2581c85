"""The network at its real width: ``packed.safetensors``.

A safetensors file with a tensor for each entry of the state dict, under its
name. Quantized weights are ``uint8`` of one axis, their codes side by side;
all others have their own type and shape. The metadata have one entry,
``mmauxq``, a JSON text that holds

* ``format``: :data:`FORMAT`;
* ``layout``: for each quantized weight ``[bits, lowest code, stride, shape]``,
  so that ``code = lowest + stride * index``;
* ``meta``: describes the network.
"""

import copy
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmauxq.analysis import quantized_weights
from mmauxq.errors import UsageError, shorten
from mmauxq.files import parse_json, write_atomically
from mmauxq.forward_hooks import forward_hooks
from mmauxq.network.checkpoint import check_values
from mmauxq.optional import need
from mmauxq.quantizers import Quantizer, named_quantizers

FORMAT = 'mmauxq-packed-3'


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
def write_packed(
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
    from safetensors.torch import save

    weights = quantized_weights(architecture)
    operands = weight_operands(architecture, image)
    tensors: dict[str, Tensor] = {}
    layout: dict[str, list] = {}
    for name, tensor in architecture.state_dict().items():
        if name in weights:
            weight, quantizer = weights[name]
            layer = name.rpartition('.')[0]
            operand = operands.get(f'{layer}.weight_quantizer')
            if operand is None or not torch.equal(operand, weight):
                raise UsageError(
                    f'{name}: what is quantized is computed from it '
                    '(a standardised or merged weight), so that its codes '
                    'cannot stand for it in packed.safetensors; keep that '
                    'layer float with policy.layers'
                )
            layout[name] = [*_grid(quantizer), list(tensor.shape)]
            tensor = _packed(name, weight, quantizer)
        # a copy, since safetensors takes no views of one storage
        tensors[name] = tensor.cpu().contiguous().clone()
    about = dict(format=FORMAT, layout=layout, meta=meta or {})
    # one entry: safetensors writes several in another order each time
    text = json.dumps(about, separators=(',', ':'))
    content = save(tensors, dict(mmauxq=text))
    write_atomically(out, content)
    return len(content)


def _grid(quantizer: Quantizer) -> tuple[int, int, int]:
    """Bits, lowest code and stride."""
    grid = quantizer.grid()
    return quantizer.bits, grid.qmin, grid.stride


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


@torch.no_grad()
def fill_packed(
    file: str | os.PathLike, architecture: nn.Module
) -> dict[str, Any]:
    """Fill ``architecture`` from a packed file; its ``meta``.

    Parameters become the quantized values, or what is quantized to them: in
    evaluation the network is the one that was saved, to the bit.

    Raises:
        UsageError: If the file is not a packed one, or one of another network.
    """
    state, codes, layout, meta = _read(file)
    whole = copy.deepcopy(architecture)  # so that an error changes nothing
    weights = quantized_weights(whole)
    own = whole.state_dict()
    differing = (codes.keys() ^ weights.keys()) | (
        (state.keys() | codes.keys()) ^ own.keys()
    )
    if differing:
        raise UsageError(
            f'{file}: expected the tensors of this network, got one of '
            f'another, which differs in {min(differing)}'
        )
    for name, tensor in state.items():
        expected = own[name].dtype, tuple(own[name].shape)
        got = tensor.dtype, tuple(tensor.shape)
        if got != expected:
            raise UsageError(f'{file}: {name}: expected {expected}, got {got}')
    whole.load_state_dict(state, strict=False)
    for name, code in codes.items():
        weight, quantizer = weights[name]
        # of as many bits, all that it can hold are codes of the grid
        expected = *_grid(quantizer), tuple(weight.shape)
        got = *layout[name], tuple(code.shape)
        if got != expected:
            raise UsageError(
                f'{file}: {name}: expected bits, lowest code, stride and '
                f'shape {expected}, got {got}'
            )
        weight.copy_(quantizer.weight_of(code.to(weight.device)))
    architecture.load_state_dict(whole.state_dict())
    return meta


def read_packed(
    file: str | os.PathLike,
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, int]], dict[str, Any]]:
    """The state dict of a packed file without the quantized weights; (integer
    codes, bits) of these by name; ``meta``.

    Raises:
        UsageError: If the file is not a packed network, or is damaged.
    """
    state, codes, layout, meta = _read(file)
    pairs = {name: (code, layout[name][0]) for name, code in codes.items()}
    return state, pairs, meta


def _read(file: str | os.PathLike) -> tuple[dict, dict, dict, dict]:
    """State, codes, (bits, lowest code, stride) of these, and ``meta``."""
    need('safetensors')
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), 'pt') as content:
            about = _json(file, content.metadata() or {})
            state = {name: content.get_tensor(name) for name in content.keys()}
    except (OSError, SafetensorError) as error:
        raise UsageError(f'{file}: cannot be read ({error})') from error
    except (ValueError, OverflowError, RuntimeError) as error:
        raise UsageError(f'{file}: is damaged ({error})') from error
    layout, meta = about.get('layout'), about.get('meta')
    if not isinstance(layout, dict) or not isinstance(meta, dict):
        raise UsageError(f'{file}: expected a layout and meta, got none')
    codes = {}
    for name, entry in layout.items():
        place = f'{file}: {name}'
        if not _is_layout(entry) or name not in state:
            raise UsageError(
                f'{place}: expected a tensor, and its bits, lowest code, '
                f'stride and shape in the layout, got {shorten(entry)}'
            )
        bits, lowest, stride, shape = entry
        packed, count = state.pop(name), math.prod(shape)
        size = math.ceil(count * bits / 8)
        if packed.dtype != torch.uint8 or packed.shape != (size,):
            raise UsageError(
                f'{place}: expected {size} bytes for {count} codes of {bits} '
                f'bits, got {packed.dtype}, {tuple(packed.shape)}'
            )
        if size and int(packed[-1]) >> (8 - (size * 8 - count * bits)):
            raise UsageError(f'{place}: expected zeros after the last code')
        index = torch.from_numpy(unpack(packed.numpy(), bits, count))
        codes[name] = (index.int() * stride + lowest).reshape(shape)
        layout[name] = bits, lowest, stride
    for name, tensor in state.items():
        step = name.endswith(('_quantizer.step', '_quantizer.alpha'))
        check_values(name, tensor, step, str(file))
    return state, codes, layout, meta


def _json(file: str | os.PathLike, metadata: Mapping) -> dict:
    """What the metadata say of the network."""
    about, written = None, metadata.get('format')
    if 'mmauxq' in metadata:
        try:
            about = parse_json(metadata['mmauxq'])
        except ValueError as error:
            raise UsageError(f'{file}: expected JSON ({error})') from error
        written = about.get('format') if isinstance(about, dict) else about
    if written != FORMAT or about is None:
        raise UsageError(
            f'{file}: expected the format {FORMAT!r}, got {shorten(written)}; '
            'export the network again'
        )
    return about


def _is_layout(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 4:
        return False
    bits, lowest, stride, shape = entry
    numbers = [bits, lowest, stride, *(shape if type(shape) is list else [''])]
    return (
        all(type(number) is int for number in numbers)
        and 1 <= bits <= 8
        and abs(lowest) < 256
        and stride in (1, 2)
        and len(shape) <= 8
        and all(0 <= length < 2**31 for length in shape)
    )
