"""The network at its real width: ``packed.safetensors``."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.layers import QuantizedLayer
from mmauxq.quantizers import Quantizer
from mmauxq.version import __version__

from .packing import pack, unpack

FORMAT = '1'
SUFFIX = '.codes'


def quantized_weights(
    model: nn.Module,
) -> dict[str, tuple[nn.Module, Quantizer]]:
    """Name of a weight -> its layer and quantizer; shared ones once."""
    return {
        f'{name}.weight': (layer, layer.weight_quantizer)
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer)
        and isinstance(layer.weight_quantizer, Quantizer)
    }


@torch.no_grad()
def save_packed(
    architecture: nn.Module,
    out: str | os.PathLike,
    meta: dict[str, str] | None = None,
) -> int:
    """Write F with its weights as packed integer codes.

    The file holds ``NAME.weight.codes`` (uint8, see :func:`pack`; the index
    of the level, 0 for the lowest) for quantized weights, and everything else
    of the state dict, scales and offsets among it, as it is. How to read it is
    in the metadata: bits, shape, lowest code and stride of each weight.

    Args:
        architecture: Quantized and calibrated.
        out: File to write.
        meta: More metadata.

    Returns:
        Its size in bytes.

    Raises:
        UsageError: If a quantizer has no integer form, or a layer quantizes
            something else than its stored weight.
    """
    from safetensors.torch import save_file

    state = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in architecture.state_dict().items()
    }
    layout = {}
    for name, (layer, quantizer) in quantized_weights(architecture).items():
        grid, weight = quantizer.grid(), layer.weight
        codes = quantizer.codes(weight)
        again = quantizer.weight_of(codes)
        if not torch.equal(quantizer(again), quantizer(weight)):
            raise UsageError(
                f'{name}: its codes do not give its values back; '
                f'{type(quantizer).__name__} at {quantizer.bits} bits cannot '
                'be packed'
            )
        index = (codes - grid.qmin) // grid.stride
        del state[name]
        state[name + SUFFIX] = torch.from_numpy(
            pack(index.cpu().numpy(), quantizer.bits)
        )
        layout[name] = dict(
            bits=quantizer.bits,
            shape=list(weight.shape),
            lowest=grid.qmin,
            stride=grid.stride,
        )
    metadata = dict(
        meta or {},
        format=f'mmauxq-packed-{FORMAT}',
        mmauxq_version=__version__,
        weights=json.dumps(layout, separators=(',', ':')),
    )
    save_file(state, str(out), metadata)
    return Path(out).stat().st_size


def load_packed(
    file: str | os.PathLike, architecture: nn.Module
) -> dict[str, str]:
    """Fill ``architecture`` from a packed file.

    Its parameters become the quantized values, or what is quantized to them:
    in evaluation the network is the one that was saved, to the bit.

    Args:
        file: Written by :func:`save_packed`.
        architecture: Quantized as the one that was saved.

    Returns:
        The metadata.

    Raises:
        UsageError: If the file is no such file, or one of another network.
    """
    state, metadata = _read(file)
    layout = json.loads(metadata['weights'])
    weights = quantized_weights(architecture)
    if layout.keys() != weights.keys():
        raise UsageError(
            f'{file}: quantizes {len(layout)} weights, this network '
            f'{len(weights)}; the first that differs is '
            f'{min(layout.keys() ^ weights.keys())}'
        )
    for name, (layer, quantizer) in weights.items():
        entry = layout[name]
        if (
            entry['bits'] != quantizer.bits
            or tuple(entry['shape']) != layer.weight.shape
        ):
            raise UsageError(
                f'{file}: {name} has {entry["bits"]} bits and shape '
                f'{entry["shape"]} there, {quantizer.bits} bits and shape '
                f'{list(layer.weight.shape)} here'
            )
    packed = {name: state.pop(name + SUFFIX) for name in layout}
    missing, unexpected = architecture.load_state_dict(state, strict=False)
    missing = [name for name in missing if name not in layout]
    if missing or unexpected:
        raise UsageError(
            f'{file}: is of another network: {(missing + unexpected)[0]}'
        )
    for name, (layer, quantizer) in weights.items():
        entry = layout[name]
        index = unpack(
            packed[name].numpy(), entry['bits'], layer.weight.numel()
        )
        codes = (
            torch.from_numpy(index).int().reshape(entry['shape'])
            * entry['stride']
            + entry['lowest']
        )
        with torch.no_grad():
            codes = codes.to(layer.weight.device)
            layer.weight.copy_(quantizer.weight_of(codes))
    return metadata


def _read(file: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), 'pt') as content:
            metadata = content.metadata() or {}
            state = {name: content.get_tensor(name) for name in content.keys()}
    except (OSError, SafetensorError) as error:
        raise UsageError(f'{file}: cannot be read ({error})') from error
    if metadata.get('format') != f'mmauxq-packed-{FORMAT}':
        raise UsageError(
            f'{file}: its format is {metadata.get("format")!r}; allowed is '
            f"'mmauxq-packed-{FORMAT}'"
        )
    return state, metadata
