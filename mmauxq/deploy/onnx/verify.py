"""Whether an artefact computes what the PyTorch network computes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmauxq.forward_hooks import forward_hooks
from mmauxq.quantizers import Quantizer, named_quantizers

from .lowered import Lowered
from .runtime import session, with_outputs
from .trace import INPUT, OUTPUT, logits_of

# A value is at a rounding tie if it is so near, in steps, to a threshold.
TIE = 1e-4
# Difference of logits, as a part of the largest, that float sums in another
# order may make.
LOGITS = 1e-5


@dataclass
class Agreement:
    """An artefact against PyTorch, on the same images.

    Codes are compared layer by layer: PyTorch computes each layer from the
    codes that the artefact had before it. So every code of every image is
    compared, and a difference is that of one layer alone.

    Args:
        images: Number of images.
        max_difference: Largest difference of logits, from the same codes; from
            the same images if codes are not compared.
        largest_logit: Largest absolute logit.
        same_class: Images to which both give the same class.
        unexplained_classes: Images with another class and the same codes.
        codes: Integer codes of activations compared.
        ties: Codes that differ by one, where the value is within
            :data:`TIE` of a rounding threshold: float sums in another order.
        rounded: Codes that differ by one after a layer whose biases had to
            be rounded, within the reach of that rounding.
        unexplained: Codes that differ otherwise.
        images_touched: Images in which a code differs.
        top1: Fraction of the labelled images that the artefact gets right;
            ``None`` without labels.
        top1_torch: Fraction that PyTorch gets right.
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

    @property
    def holds(self) -> bool:
        """Whether float rounding explains every difference."""
        return (
            not (self.unexplained or self.unexplained_classes)
            and self.max_difference <= LOGITS * self.largest_logit
        )

    def as_dict(self) -> dict[str, Any]:
        """For a JSON report."""
        return {**asdict(self), 'holds': self.holds}


def compare(
    architecture: nn.Module,
    model: Any,
    batches: Sequence[tuple[Tensor, Tensor]],
    lowered: Lowered | None = None,
    logits: Tensor | None = None,
) -> Agreement:
    """Run ``model`` and PyTorch on the same images.

    Args:
        architecture: In evaluation mode, on the CPU.
        model: An ONNX model.
        batches: (images, labels); a label below 0 is unknown.
        lowered: Says where the codes are. Without it only logits and classes
            are compared.
        logits: Of ``architecture`` for all images, if they are known.
    """
    places = lowered.codes if lowered else {}
    outputs = [value for value, _ in places.values()]
    running = session(with_outputs(model, outputs) if outputs else model)
    result = Agreement()
    exported, from_same_codes, touched = [], [], []
    for images, _ in batches:
        feed = {INPUT: images.numpy()}
        output, *inner = running.run([OUTPUT, *outputs], feed)
        if outputs and not exported:
            # the same kernels run, whether inner values are read or not
            alone = session(model).run([OUTPUT], feed)[0]
            result.unexplained += int((alone != output).any(1).sum())
        exported.append(output)
        if lowered is not None:
            codes = {
                name: torch.from_numpy(array.astype(np.int32) - zero)
                for (name, (_, zero)), array in zip(
                    places.items(), inner, strict=True
                )
            }
            followed, differs = _follow(
                architecture, images, codes, lowered.reach, result
            )
            from_same_codes.append(followed)
            touched.append(differs)
    output = torch.from_numpy(np.concatenate(exported))
    if logits is None:
        logits, _ = logits_and_top1(architecture, batches)
    agrees = output.argmax(1) == logits.argmax(1)
    result.images, result.same_class = len(output), int(agrees.sum())
    same_codes = logits
    if lowered is not None:
        same_codes, differs = torch.cat(from_same_codes), torch.cat(touched)
        result.images_touched = int(differs.sum())
        result.unexplained_classes = int((~agrees & ~differs).sum())
    result.max_difference = float((output - same_codes).abs().max())
    result.largest_logit = float(logits.abs().max())
    result.top1 = _top1(output, batches)
    result.top1_torch = _top1(logits, batches)
    return result


@torch.no_grad()
def _follow(
    architecture: nn.Module,
    images: Tensor,
    codes: Mapping[str, Tensor],
    reach: Mapping[str, float],
    result: Agreement,
) -> tuple[Tensor, Tensor]:
    """Run PyTorch with quantizers that give the codes of the artefact.

    Their own codes are compared with these, and counted in ``result``.

    Returns:
        Logits (N, K); (N,), the images in which a code differs.
    """
    touched = torch.zeros(len(images), dtype=torch.bool)

    def follow(name: str, quantizer: Quantizer, x: Tensor, y: Tensor):
        grid = quantizer.grid()
        offset = 0.0 if grid.offset is None else quantizer.broadcast(
            grid.offset, x
        )  # fmt: skip
        scale = quantizer.broadcast(grid.scale, x)
        exported = codes[name]
        expected = ((y.double() - offset) / scale).round()
        differs = expected != exported
        result.codes += exported.numel()
        if not differs.any():
            return None
        touched.logical_or_(differs.flatten(1).any(1))
        steps = ((x.double() - offset) / scale)[differs]
        distance = (steps - steps.floor() - 0.5).abs()
        by_one = (expected - exported)[differs].abs() == 1
        tie = by_one & (distance <= TIE)
        rounded = by_one & ~tie & (distance <= reach.get(name, 0.0) + TIE)
        result.ties += int(tie.sum())
        result.rounded += int(rounded.sum())
        result.unexplained += int((~tie & ~rounded).sum())
        return torch.where(differs, quantizer.weight_of(exported), y)

    followed = [
        (name, quantizer)
        for name, quantizer in named_quantizers(architecture)
        if name in codes
    ]
    with forward_hooks(followed, follow):
        return logits_of(architecture, images), touched


def differing_weights(
    architecture: nn.Module, lowered: Lowered, operands: Mapping[str, Tensor]
) -> list[str]:
    """Weight quantizers whose codes in the file are not those of PyTorch.

    The codes of a channel may be multiplied by one integer, with the sign of
    the slope of a folded batch norm.

    Args:
        architecture: The exported network.
        lowered: The exported model; says which matrices are transposed, and
            which channels a batch norm multiplies by 0.
        operands: Weight quantizer -> its input.
    """
    from onnx import numpy_helper

    stored = {
        tensor.name: numpy_helper.to_array(tensor).astype(np.int64)
        for tensor in lowered.model.graph.initializer
        if tensor.name.endswith('.codes')
    }
    differing = []
    for name, quantizer in named_quantizers(architecture):
        if name not in operands:
            continue
        expected = quantizer.codes(operands[name]).numpy().astype(np.int64)
        codes = stored[f'{name}.codes']
        if name in lowered.transposed:
            codes = codes.T
        if name in lowered.zeroed:
            expected[lowered.zeroed[name]] = 0
        if not _is_multiple(codes, expected):
            differing.append(name)
    return differing


def _is_multiple(codes: np.ndarray, expected: np.ndarray) -> bool:
    """Whether each row is a multiple, other than by 0, of the expected one."""
    if (
        codes.shape != expected.shape
        or ((codes == 0) != (expected == 0)).any()
    ):
        return False
    codes = codes.reshape(len(codes), -1)
    expected = expected.reshape(codes.shape)
    at = np.abs(expected).argmax(1)[:, None]
    factor = np.take_along_axis(codes, at, 1)
    divisor = np.take_along_axis(expected, at, 1)
    return bool((codes * divisor == expected * factor).all())


@torch.no_grad()
def logits_and_top1(
    architecture: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, float | None]:
    """Logits of all images, and the fraction of the labels that they meet."""
    logits = torch.cat([logits_of(architecture, x) for x, _ in batches])
    return logits, _top1(logits, batches)


def _top1(
    logits: Tensor, batches: Sequence[tuple[Tensor, Tensor]]
) -> float | None:
    labels = torch.cat([labels for _, labels in batches])
    known = int((labels >= 0).sum())
    right = int((logits.argmax(1) == labels).sum())
    return right / known if known else None
