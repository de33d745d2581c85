"""Whether an artefact computes what the PyTorch network computes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.forward_hooks import forward_hooks
from mmauxq.quantizers import Quantizer, named_quantizers
from mmauxq.text import percent

from ..packed import weight_operands
from .runtime import session, with_outputs
from .trace import INPUT, OUTPUT, logits_of

if TYPE_CHECKING:
    from .graph import Lowered

Batches = Sequence[tuple[Tensor, Tensor]]
"""(images, labels) pairs; a label below 0 is unknown."""
# A value of up to 8 bits is at a rounding tie if it is so near, in steps, to a
# threshold. Each further bit doubles what float32 rounds off, in steps.
TIE = 1e-4
# Difference of logits, as a part of the largest, that float sums in another
# order may make.
LOGITS = 1e-5
# Fields of an agreement that say nothing unless codes were compared.
OF_CODES = (
    'unexplained_classes', 'codes', 'ties', 'rounded', 'unexplained',
    'images_touched',
)  # fmt: skip


class Places(Protocol):
    """Where an artefact has its codes; see :class:`.graph.Lowered`."""

    codes: dict[str, tuple[str, int]]
    reach: dict[str, float]


@dataclass
class Agreement:
    """An artefact against PyTorch, on the same images.

    Codes are compared layer by layer: PyTorch computes each layer from the
    codes that the artefact had before it. So every code of every image is
    compared, and a difference is that of one layer alone.

    Args:
        max_difference: Largest difference of logits, from the same codes; from
            the same images if codes are not compared.
        largest_logit: Largest absolute logit.
        same_class: Images to which both give the same class.
        unexplained_classes: Images with another class than PyTorch's, which
            PyTorch does not give from the artefact's codes of that image.
        codes: Number of integer codes of activations compared.
        ties: Codes that differ by one, where the value is within
            :data:`TIE` of a rounding threshold.
        rounded: Codes that differ by one within the reach of a rounded bias.
        unexplained: Codes that differ otherwise.
        images_touched: Images in which a code differs.
        top1: Accuracy of the artefact; ``None`` without labels.
        codes_compared: Whether the numbers of codes were counted at all.
    """

    images: int = 0
    max_difference: float = 0.0
    largest_logit: float = 0.0
    same_class: int = 0
    unexplained_classes: int = 0
    codes: int = 0
    ties: int = 0
    rounded: int = 0
    unexplained: int = 0
    images_touched: int = 0
    top1: float | None = None
    top1_torch: float | None = None
    codes_compared: bool = False

    @property
    def holds(self) -> bool:
        """Whether float rounding explains every difference."""
        return (
            not (self.unexplained or self.unexplained_classes)
            and self.max_difference <= LOGITS * self.largest_logit
        )

    def check(self, name: str) -> None:
        """Raise a UsageError if the artefact ``name`` is another network."""
        if not self.holds:
            raise UsageError(
                f'{name} differs from PyTorch: {self.unexplained} codes and '
                f'{self.unexplained_classes} classes away from rounding ties, '
                f'logits by {self.max_difference:.1e}'
            )

    def line(self, codes: str) -> str:
        """What was measured, in words; ``codes`` says what of them."""
        return (
            f'agreement: same class for {self.same_class} of {self.images} '
            f'images, logits within {self.max_difference:.1e} (largest '
            f'{self.largest_logit:.1f}), top-1 {percent(self.top1)} '
            f'(PyTorch {percent(self.top1_torch)}); {codes}'
        )

    def measured(self) -> dict[str, Any]:
        """What was measured, for JSON."""
        if self.codes_compared:
            return {**vars(self), 'holds': self.holds}
        return {k: v for k, v in vars(self).items() if k not in OF_CODES}


def compare(
    architecture: nn.Module,
    model: Any,
    batches: Batches,
    lowered: Places | None = None,
    start: Callable[[Any], Any] = session,
    add_outputs: Callable[[Any, Sequence[str]], Any] | None = None,
) -> Agreement:
    """Run ``model``, an ``onnx.ModelProto``, and PyTorch, in evaluation mode
    on the CPU, on the same images.

    ``lowered`` says where the codes are; without it they are not compared.
    ``start`` gives what runs a model, with the method ``run`` of a session of
    ONNX Runtime. ``add_outputs`` gives the same model with more
    outputs, instead of :func:`.runtime.with_outputs`.
    """
    places = lowered.codes if lowered else {}
    reach = lowered.reach if lowered else {}
    outputs = [value for value, _ in places.values()]
    running = start((add_outputs or with_outputs)(model, outputs))
    result = Agreement(codes_compared=lowered is not None)
    exported, from_same_codes, touched = [], [], []
    for images, _ in batches:
        feed = {INPUT: images.numpy()}
        output, *inner = running.run([OUTPUT, *outputs], feed)
        if outputs and not exported:
            # the same kernels run, whether inner values are read or not
            alone = start(model).run([OUTPUT], feed)[0]
            result.unexplained += int((alone != output).any(1).sum())
        pairs = zip(places.items(), inner, strict=True)
        codes = {
            name: torch.from_numpy(array.astype(np.int32) - zero)
            for (name, (_, zero)), array in pairs
        }
        followed, differs = _follow(architecture, images, codes, reach, result)
        exported.append(torch.from_numpy(output))
        from_same_codes.append(followed)
        touched.append(differs)
    output, followed = torch.cat(exported), torch.cat(from_same_codes)
    logits, classes = all_logits(architecture, batches), output.argmax(1)
    agrees = classes == logits.argmax(1)
    result.images, result.same_class = len(output), int(agrees.sum())
    if lowered is not None:
        result.images_touched = int(torch.cat(touched).sum())
        explained = agrees | (classes == followed.argmax(1))
        result.unexplained_classes = int((~explained).sum())
    difference = output - followed
    result.max_difference = float(difference.abs().max())
    result.largest_logit = float(logits.abs().max())
    result.top1 = top1(output, batches)
    result.top1_torch = top1(logits, batches)
    return result


@torch.no_grad()
def _follow(
    architecture: nn.Module,
    images: Tensor,
    codes: Mapping[str, Tensor],
    reach: Mapping[str, float],
    result: Agreement,
) -> tuple[Tensor, Tensor]:
    """Run PyTorch with quantizers that give the codes of the artefact, count
    differences from their own in ``result``, and return the logits (N, K) and
    in which images (N,) a code differs."""
    touched = torch.zeros(len(images), dtype=torch.bool)

    def follow(name: str, quantizer: Quantizer, x: Tensor, y: Tensor):
        exported = codes[name]
        expected = quantizer.in_steps(y).round()
        differs = expected != exported
        result.codes += exported.numel()
        if not differs.any():
            return None
        touched.logical_or_(differs.flatten(1).any(1))
        steps = quantizer.in_steps(x)[differs]
        distance = (steps - steps.floor() - 0.5).abs()
        near = TIE * 2 ** max(quantizer.bits - 8, 0)
        by_one = (expected - exported)[differs].abs() == 1
        tie = by_one & (distance <= near)
        rounded = by_one & ~tie & (distance <= reach.get(name, 0.0) + near)
        result.ties += int(tie.sum())
        result.rounded += int(rounded.sum())
        result.unexplained += int((~tie & ~rounded).sum())
        return torch.where(differs, quantizer.weight_of(exported), y)

    modules = ((name, architecture.get_submodule(name)) for name in codes)
    with forward_hooks(modules, follow):
        return logits_of(architecture, images), touched


def differing_weights(
    architecture: nn.Module, lowered: 'Lowered', image: Tensor
) -> list[str]:
    """Weight quantizers whose codes in the file are not those of PyTorch, up
    to one factor for each channel: an integer with the sign of the slope of a
    folded batch norm."""
    from onnx import numpy_helper

    tensors = {t.name: t for t in lowered.model.graph.initializer}
    quantizers = dict(named_quantizers(architecture))
    differing = []
    for name, operand in weight_operands(architecture, image).items():
        if f'{name}.codes' not in tensors:
            continue  # nothing that it gives reaches the logits
        expected = quantizers[name].codes(operand).numpy().astype(int)
        codes = numpy_helper.to_array(tensors[f'{name}.codes']).astype(int)
        if name in lowered.transposed:
            codes = codes.T
        if name in lowered.zeroed:
            expected[lowered.zeroed[name]] = 0
        if not _is_multiple(codes, expected):
            differing.append(name)
    return differing


def _is_multiple(codes: np.ndarray, expected: np.ndarray) -> bool:
    """Whether each row is a multiple, other than by 0, of the expected one."""
    if not np.array_equal(codes == 0, expected == 0):
        return False
    codes = codes.reshape(len(codes), -1)
    expected = expected.reshape(codes.shape)
    at = np.abs(expected).argmax(1)[:, None]
    factor = np.take_along_axis(codes, at, 1)
    divisor = np.take_along_axis(expected, at, 1)
    return bool((codes * divisor == expected * factor).all())


@torch.no_grad()
def all_logits(architecture: nn.Module, batches: Batches) -> Tensor:
    """Logits (N, K) of all images."""
    return torch.cat([logits_of(architecture, x) for x, _ in batches])


def top1(logits: Tensor, batches: Batches) -> float | None:
    """Fraction of the known labels that the logits meet, if there are any."""
    labels = torch.cat([labels for _, labels in batches])
    known = int((labels >= 0).sum())
    right = int((logits.argmax(1) == labels).sum())
    return right / known if known else None
