"""Whether an artefact computes what the PyTorch network computes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmauxq.quantizers import Quantizer, named_quantizers

from .lower import Lowered
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
        max_difference: Of logits, from the same codes; from the same images
            if codes are not compared.
        largest_logit: In size.
        same_class: Images to which both give the same class.
        unexplained_classes: Images with another class and the same codes.
        codes: Integer codes of activations compared.
        ties: Codes that differ by one, where the value is within
            :data:`TIE` of a rounding threshold: float sums in another order.
        rounded: Codes that differ by one after a layer whose biases had to
            be rounded, within the reach of that rounding.
        unexplained: Codes that differ otherwise.
        images_touched: Images in which a code differs.
        top1: Part of the labels met, by the artefact.
        top1_torch: Part of the labels met, by PyTorch.
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
    batches: Iterable[tuple[Tensor, Tensor]],
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
    names = lowered.codes if lowered else {}
    outputs = [value for value, _ in names.values()]
    running = session(with_outputs(model, outputs) if names else model)
    result = Agreement()
    right = right_torch = known = 0
    for images, labels in batches:
        feed = {INPUT: images.numpy()}
        have, *found = running.run([OUTPUT, *outputs], feed)
        if names and not result.images:
            # the same kernels run, whether watched or not
            alone = session(model).run([OUTPUT], feed)[0]
            result.unexplained += int((alone != have).any(1).sum())
        with torch.no_grad():
            if logits is None:
                want = logits_of(architecture, images).numpy()
            else:
                want = logits[result.images :][: len(images)].numpy()
            same_codes = want
            touched = np.zeros(len(images), bool)
            if lowered is not None:
                codes = {
                    name: array.astype(np.int32) - names[name][1]
                    for name, array in zip(names, found, strict=True)
                }
                with _following(
                    architecture, codes, lowered.reach, result, touched
                ):
                    same_codes = logits_of(architecture, images).numpy()
        result.images += len(images)
        result.images_touched += int(touched.sum())
        result.max_difference = max(
            result.max_difference, float(np.abs(have - same_codes).max())
        )
        result.largest_logit = max(
            result.largest_logit, float(np.abs(want).max())
        )
        agrees = have.argmax(1) == want.argmax(1)
        result.same_class += int(agrees.sum())
        if lowered is not None:
            result.unexplained_classes += int((~agrees & ~touched).sum())
        target = labels.numpy()
        known += int((target >= 0).sum())
        right += int((have.argmax(1) == target).sum())
        right_torch += int((want.argmax(1) == target).sum())
    if known:
        result.top1, result.top1_torch = right / known, right_torch / known
    return result


@contextmanager
def _following(
    architecture: nn.Module,
    codes: Mapping[str, np.ndarray],
    reach: Mapping[str, float],
    result: Agreement,
    touched: np.ndarray,
) -> Iterator[None]:
    """While active, quantizers give the codes of the artefact.

    What they would have given is compared first. ``touched`` marks the images
    in which a code differs.
    """

    def follow(name: str, quantizer: Quantizer, x: Tensor, y: Tensor):
        grid = quantizer.grid()
        offset = 0.0 if grid.offset is None else quantizer._spread(
            grid.offset, x
        )  # fmt: skip
        scale = quantizer._spread(grid.scale, x)
        have = torch.from_numpy(codes[name])
        want = ((y.double() - offset) / scale).round()
        differs = want != have
        result.codes += have.numel()
        if not differs.any():
            return None
        touched[differs.flatten(1).any(1).numpy()] = True
        steps = ((x.double() - offset) / scale)[differs]
        distance = (steps - steps.floor() - 0.5).abs()
        by_one = (want - have)[differs].abs() == 1
        tie = by_one & (distance <= TIE)
        rounded = by_one & ~tie & (distance <= reach.get(name, 0.0) + TIE)
        result.ties += int(tie.sum())
        result.rounded += int(rounded.sum())
        result.unexplained += int((~tie & ~rounded).sum())
        return torch.where(differs, quantizer.weight_of(have), y)

    handles = [
        quantizer.register_forward_hook(
            lambda module, args, output, name=name: follow(
                name, module, args[0], output
            )
        )
        for name, quantizer in named_quantizers(architecture)
        if name in codes
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def differing_weights(
    architecture: nn.Module, model: Any, operands: Mapping[str, Tensor]
) -> list[str]:
    """Weight quantizers whose codes in the file are not those of PyTorch.

    Codes of a channel may be spread by one whole number, and turned in sign by
    a folded batch norm; a channel that a batch norm multiplies by 0 is 0.

    Args:
        architecture: As exported.
        model: An ONNX model.
        operands: Weight quantizer -> its input.
    """
    from onnx import numpy_helper

    stored = {
        tensor.name: numpy_helper.to_array(tensor).astype(np.int64)
        for tensor in model.graph.initializer
        if tensor.name.endswith('.codes')
    }
    differing = []
    for name, quantizer in named_quantizers(architecture):
        if name not in operands:
            continue
        want = quantizer.codes(operands[name]).numpy().astype(np.int64)
        have = stored[f'{name}.codes']
        # a linear layer may be stored as its transpose
        if not any(_is_spread(turned, want) for turned in (have, have.T)):
            differing.append(name)
    return differing


def _is_spread(have: np.ndarray, want: np.ndarray) -> bool:
    """Whether each row is a multiple of what it should be, or 0."""
    if have.shape != want.shape or have[want == 0].any():
        return False
    have, want = have.reshape(len(have), -1), want.reshape(len(want), -1)
    at = np.abs(want).argmax(1)[:, None]
    one = np.take_along_axis(want, at, 1), np.take_along_axis(have, at, 1)
    return bool((have * one[0] == want * one[1]).all())


def logits_and_top1(
    architecture: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, float | None]:
    """Logits of all images, and the part of the labels that they meet."""
    with torch.no_grad():
        logits = torch.cat([logits_of(architecture, x) for x, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    known = int((labels >= 0).sum())
    right = int((logits.argmax(1) == labels).sum())
    return logits, right / known if known else None
