"""Whether an artefact computes what the PyTorch network computes."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmauxq.evaluation import operand_values
from mmauxq.quantizers import Quantizer, named_quantizers

from .runtime import session, with_outputs
from .trace import INPUT, OUTPUT, logits_of

# A value is at a rounding tie if it is so near, in steps, to a threshold.
TIE = 1e-3


@dataclass
class Agreement:
    """An artefact against PyTorch, on the same images.

    An image is touched when a value so near to a rounding threshold that
    float32 sums in another order cross it became the other code. What follows
    in that image differs then, too, so that its later codes are not compared.

    Args:
        images: Number of images.
        max_difference: Of logits, over images that no tie touched.
        max_difference_all: Over all images.
        largest_logit: In size.
        top1_agreement: Part of the images with the same class.
        top1_differing_untouched: Images with another class and no tie.
        codes: Integer codes compared.
        ties: Codes that differ at a tie.
        unexplained: Codes that differ elsewhere.
        images_touched: Images in which a code differs.
        top1: Part of the labels met, by the artefact.
        top1_torch: Part of the labels met, by PyTorch.
    """

    images: int = 0
    max_difference: float = 0.0
    max_difference_all: float = 0.0
    largest_logit: float = 0.0
    top1_agreement: float = 0.0
    top1_differing_untouched: int = 0
    codes: int = 0
    ties: int = 0
    unexplained: int = 0
    images_touched: int = 0
    top1: float | None = None
    top1_torch: float | None = None

    @property
    def holds(self) -> bool:
        """Whether every difference is explained by a tie."""
        return not (self.unexplained or self.top1_differing_untouched)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON report."""
        return {**asdict(self), 'holds': self.holds}


def _inputs(
    architecture: nn.Module, images: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Inputs and outputs of the activation quantizers, and the logits."""
    raw: dict[str, Tensor] = {}
    handles = [
        quantizer.register_forward_pre_hook(
            lambda _, args, name=name: raw.update({name: args[0].clone()})
        )
        for name, quantizer in named_quantizers(architecture)
        if quantizer.role == 'activation'
    ]
    try:
        with torch.no_grad():
            logits = logits_of(architecture, images)
        values = operand_values(architecture, images)
    finally:
        for handle in handles:
            handle.remove()
    return raw, values, logits


def _steps(quantizer: Quantizer, x: Tensor) -> Tensor:
    grid = quantizer.grid()
    value = x.double()
    if grid.offset is not None:
        value = value - quantizer._spread(grid.offset, x)
    return value / quantizer._spread(grid.scale, x)


def _compare_codes(
    architecture: nn.Module,
    images: Tensor,
    names: Mapping[str, tuple[str, int]],
    found: Mapping[str, np.ndarray],
    result: Agreement,
) -> tuple[np.ndarray, np.ndarray]:
    quantizers = dict(named_quantizers(architecture))
    raw, values, logits = _inputs(architecture, images)
    clean = np.ones(len(images), bool)
    for name in values:
        if name not in names or name not in raw:
            continue
        quantizer = quantizers[name]
        value, zero = names[name]
        want = _steps(quantizer, values[name]).round().numpy()
        have = found[value].astype(np.int32) - zero
        rest = tuple(range(1, want.ndim))
        result.codes += int(want[clean].size)
        differs = (want != have) & clean.reshape(-1, *[1] * len(rest))
        if not differs.any():
            continue
        steps = _steps(quantizer, raw[name]).numpy()
        near = np.abs(steps - np.floor(steps) - 0.5) < TIE
        near &= np.abs(want - have) == 1
        result.ties += int((differs & near).sum())
        result.unexplained += int((differs & ~near).sum())
        clean &= ~differs.any(rest)
    return clean, logits.numpy()


def compare(
    architecture: nn.Module,
    model: Any,
    batches: Iterator[tuple[Tensor, Tensor]],
    codes: Mapping[str, tuple[str, int]] | None = None,
) -> Agreement:
    """Run ``model`` and PyTorch on the same images.

    Args:
        architecture: In evaluation mode, on the CPU.
        model: An ONNX model.
        batches: (images, labels); a label below 0 is unknown.
        codes: Activation quantizer -> (value of the model, code of zero), as
            in :class:`mmauxq.export.lower.Lowered`. Without it codes are not
            compared.
    """
    names = dict(codes or {})
    plain = session(model)
    outputs = [value for value, _ in names.values()]
    watched = session(with_outputs(model, outputs)) if names else None
    result = Agreement()
    same = right = right_torch = known = 0
    for images, labels in batches:
        feed = {INPUT: images.numpy()}
        logits = plain.run([OUTPUT], feed)[0]
        clean = np.ones(len(images), bool)
        if watched is not None:
            found = dict(zip(outputs, watched.run(outputs, feed), strict=True))
            clean, want = _compare_codes(
                architecture, images, names, found, result
            )
        else:
            with torch.no_grad():
                want = logits_of(architecture, images).numpy()
        difference = np.abs(logits - want).max(1)
        result.images += len(images)
        result.images_touched += int((~clean).sum())
        result.max_difference = max(
            result.max_difference, float(difference[clean].max(initial=0))
        )
        result.max_difference_all = max(
            result.max_difference_all, float(difference.max())
        )
        result.largest_logit = max(
            result.largest_logit, float(np.abs(want).max())
        )
        agrees = logits.argmax(1) == want.argmax(1)
        same += int(agrees.sum())
        result.top1_differing_untouched += int((~agrees & clean).sum())
        target = labels.numpy()
        known += int((target >= 0).sum())
        right += int((logits.argmax(1) == target).sum())
        right_torch += int((want.argmax(1) == target).sum())
    result.top1_agreement = same / max(result.images, 1)
    if known:
        result.top1, result.top1_torch = right / known, right_torch / known
    return result
