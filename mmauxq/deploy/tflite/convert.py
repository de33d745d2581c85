"""From PyTorch to a .tflite file whose quantized weights are integers."""

import copy
import tempfile
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmauxq.errors import UsageError, one_line
from mmauxq.forward_hooks import forward_hooks
from mmauxq.layers import restore
from mmauxq.optional import need
from mmauxq.quantizers import Quantizer, named_quantizers

from ..onnx.trace import Logits, logits_of
from ..packed import weight_operands
from .flatbuffer import assemble

PACKAGES = ('litert-torch', 'ai-edge-litert')


@dataclass
class Weight:
    """A weight as the file holds it: ``value = index * scale + offset``.

    Args:
        index: Signed integers of ``bits`` bits, convolutions as
            (out, height, width, in), which is the order of the format.
        scale: (1,) or (out,).
        offset: Value of index 0 in PyTorch's shape of the weight, or ``None``
            for 0.
        bits: 2, 4 or 8, for the types INT2, INT4 and INT8.
        lowest, stride: ``code = index * stride + lowest``, for the codes of
            the quantizer.
    """

    index: np.ndarray
    scale: np.ndarray
    offset: Tensor | None
    bits: int
    lowest: int
    stride: int

    def codes(self, index: Tensor) -> Tensor:
        """The codes (int32) of such integers, with the axes of PyTorch."""
        return channels_first(index.int() * self.stride + self.lowest)


@dataclass
class Converted:
    """A .tflite file, and where its codes are.

    Args:
        content: The file.
        inspected: The same graph, which also gives the codes of activations.
        weights: Weight quantizer -> what the file holds of it.
        codes: Activation quantizer -> (output with its codes, code of zero).
        reach: See :class:`mmauxq.deploy.onnx.graph.Lowered`; no bias is
            rounded in this form.
    """

    content: bytes
    inspected: bytes
    weights: dict[str, Weight]
    codes: dict[str, tuple[str, int]]
    reach: dict[str, float] = field(default_factory=dict)


class _Given(nn.Module):
    """Stands for a weight quantizer, and gives a tensor from outside."""

    value: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.value


class _FakeQuantize(nn.Module):
    """An activation quantizer in float operators; keeps its codes."""

    def __init__(self, quantizer: Quantizer, like: Tensor) -> None:
        super().__init__()
        grid = quantizer.grid()
        self.range = grid.qmin, grid.qmax
        scale = quantizer.broadcast(grid.scale, like)
        self.scale = channels_last(scale).clone()
        self.offset = None
        if grid.offset is not None and grid.offset.any():
            offset = quantizer.broadcast(grid.offset, like)
            self.offset = channels_last(offset).clone()
        self.codes: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)  # so that codes need no transposition
        if self.offset is not None:
            x = x - self.offset
        codes = (x / self.scale).round().clamp(*self.range)
        self.codes.append(codes)
        value = codes * self.scale
        if self.offset is not None:
            value = value + self.offset
        return channels_first(value)


class _Exported(nn.Module):
    """From an image and the weights to the logits and all codes.

    Weights are inputs, so that the converter cannot fold a scale or a batch
    norm into them, after which they would be no integers any more.
    """

    def __init__(
        self,
        architecture: nn.Module,
        weights: dict[str, Weight],
        inputs: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.architecture = copy.deepcopy(architecture).cpu().eval()
        self.given: list[tuple[_Given, Weight]] = []
        self.quantizers: list[_FakeQuantize] = []
        for name, weight in weights.items():
            given = _Given()
            self.architecture.set_submodule(name, given)
            self.given.append((given, weight))
        quantizers = dict(named_quantizers(architecture))
        for name, image in inputs.items():
            fake = _FakeQuantize(quantizers[name], image)
            self.architecture.set_submodule(name, fake)
            self.quantizers.append(fake)

    def forward(self, image: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        for (given, weight), value in zip(self.given, weights, strict=True):
            value = channels_first(value)
            if weight.offset is not None:
                value = value + weight.offset
            given.value = value
        for quantizer in self.quantizers:
            quantizer.codes = []
        logits = logits_of(self.architecture, image)
        codes = [quantizer.codes[0] for quantizer in self.quantizers]
        return logits, *codes


@torch.no_grad()
def to_tflite(
    architecture: nn.Module, image: Tensor, about: dict[str, Any]
) -> Converted:
    """Convert a quantized classifier, for one image at a time.

    Args:
        architecture: Calibrated, in evaluation mode, on the CPU.
        image: (1, C, H, W), to see what is quantized.
        about: How to use the file, for its metadata.

    Raises:
        UsageError: If litert-torch cannot convert the network, or a quantizer
            runs more than once.
    """
    need('litert_torch', 'ai_edge_litert')
    quantizers = dict(named_quantizers(architecture))
    weights = {
        name: integers(quantizers[name], operand)
        for name, operand in weight_operands(architecture, image).items()
    }
    inputs = _activations(architecture, image)
    module = _Exported(architecture, weights, inputs).eval()
    values = [
        torch.from_numpy(weight.index).float() for weight in weights.values()
    ]
    content = _convert(module, (image, *values))
    entries = {
        name: dict(bits=quantizers[name].bits, role=quantizers[name].role)
        for name in (*weights, *inputs)
    }
    about = about | dict(mmauxq_quantizers=entries)
    names = list(inputs)
    return Converted(
        assemble(content, weights, names, about, False),
        assemble(content, weights, names, about, True),
        weights,
        {name: (f'{name}.codes', 0) for name in names},
    )


@torch.no_grad()
def float_tflite(architecture: nn.Module, image: Tensor) -> bytes:
    """The network without quantizers as a .tflite file, for images like
    ``image`` (1, C, H, W)."""
    need('litert_torch')
    network = restore(copy.deepcopy(architecture))
    return _convert(Logits(network).eval(), (image,))


def integers(quantizer: Quantizer, operand: Tensor) -> Weight:
    """The codes of a weight as signed integers of the least type.

    Codes that the type does not hold as they are, such as DoReFa's odd ones,
    are numbered from its lowest value, and the rest becomes an offset.
    """
    grid = quantizer.grid()
    bits = next(n for n in (2, 4, 8) if n >= quantizer.bits)
    half = 2 ** (quantizer.bits - 1)
    lowest = 0
    if grid.stride > 1 or grid.qmin < -half or grid.qmax >= half:
        lowest = grid.qmin + grid.stride * half
    index = (quantizer.codes(operand) - lowest) // grid.stride
    offset = grid.offset
    if lowest:
        shift = lowest * grid.scale
        offset = shift if offset is None else offset + shift
    if offset is not None:
        offset = quantizer.broadcast(offset, operand).clone()
        offset = offset if offset.any() else None
    return Weight(
        channels_last(index).contiguous().numpy().astype(np.int8),
        (grid.scale * grid.stride).numpy(force=True).astype(np.float32),
        offset,
        bits,
        lowest,
        grid.stride,
    )


def channels_last(x: Tensor) -> Tensor:
    """The order of axes in a file, which has no others for 4 of them."""
    return x.movedim(1, -1) if x.dim() == 4 else x


def channels_first(x: Tensor) -> Tensor:
    """The order of axes in PyTorch."""
    return x.movedim(-1, 1) if x.dim() == 4 else x


def _activations(architecture: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What reaches each activation quantizer, which must run once."""
    seen: dict[str, Tensor] = {}

    def see(name: str, quantizer: Quantizer, x: Tensor, y: Tensor) -> None:
        if name in seen:
            raise UsageError(
                f'{name}: expected a quantizer that runs once in a forward '
                'pass, got one that runs again'
            )
        seen[name] = x

    pairs = named_quantizers(architecture)
    with forward_hooks([(n, q) for n, q in pairs if q.role != 'weight'], see):
        architecture(image, mode='tensor')
    return seen


def _convert(module: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    """What litert-torch makes of a module."""
    import litert_torch
    from litert_torch import progress

    shown = progress.config.show_progress
    progress.config.show_progress = False
    try:
        with (
            warnings.catch_warnings(),
            tempfile.TemporaryDirectory() as folder,
        ):
            warnings.simplefilter('ignore')
            file = Path(folder) / 'model.tflite'
            litert_torch.convert(module, inputs).export(str(file))
            return file.read_bytes()
    except Exception as error:  # whatever the converter runs into
        raise UsageError(
            f'litert-torch {version("litert-torch")} cannot convert this '
            f'network ({one_line(error)})'
        ) from error
    finally:
        progress.config.show_progress = shown
