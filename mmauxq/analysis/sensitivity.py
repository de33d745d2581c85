"""What a validation loses when single layers go to fewer bits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmauxq.layers import LayerBits, build_quantizer
from mmauxq.quantizers import FLOAT_BITS, calibrate
from mmauxq.quantizers.base import ROLES

from .allocation import Choice, Loss
from .cost import layer_costs, operand_bits

TINY = 1e-12
"""Scores below it count as it, since some are rounded to 0."""


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of a network.

    Args:
        metric: Name of it.
        value: Of the network as it is, in percent.
        images: Number of validation images.
        layers: Name of a layer -> its choices; the first is the layer as it
            is, the others are in the order of their bits.
        float_layers: Name of a layer that cannot be quantized -> why.
    """

    metric: str
    value: float
    images: int
    layers: dict[str, list[Choice]]
    float_layers: dict[str, str]


class Validation:
    """Evaluates a classifier, again and again, on the same images.

    Args:
        network: In evaluation mode; it is evaluated as it is now.
        batches: Preprocessed images (N, C, H, W) and their data samples.
        evaluator: Of MMEngine.
        metric: Name of what counts, the more the better; it may be set later.
        several: Whether an image may have several labels.

    Attributes:
        metrics: Name -> value of all that the evaluator gave for the network.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Sequence[tuple[Tensor, list]],
        evaluator: Any,
        metric: str,
        several: bool = False,
    ) -> None:
        self.network, self.batches = network, batches
        self.evaluator, self.metric = evaluator, metric
        self.several = several
        self.metrics, self._scores = self._run()

    @property
    def images(self) -> int:
        """Their number."""
        return sum(len(images) for images, _ in self.batches)

    def loss(self) -> Loss:
        """What the network, as it is now, loses against that of the start."""
        metrics, scores = self._run()
        return Loss(
            self.metrics[self.metric] - metrics[self.metric],
            divergence(self._scores, scores, self.several),
        )

    @torch.no_grad()
    def _run(self) -> tuple[dict[str, float], Tensor]:
        scores = []
        for images, samples in self.batches:
            predicted = self.network(images, samples, mode='predict')
            self.evaluator.process(predicted)
            scores += [sample.pred_score.cpu() for sample in predicted]
        metrics = self.evaluator.evaluate(self.images)
        return metrics, torch.stack(scores)


def divergence(before: Tensor, after: Tensor, several: bool = False) -> float:
    """Mean Kullback-Leibler divergence of scores from those before, in nats.

    Args:
        before, after: Probabilities, (N, K).
        several: Whether each class is a yes or no of its own.
    """
    before, after = before.double(), after.double()
    pairs = [(before, after)]
    if several:
        pairs.append((1 - before, 1 - after))
    terms = [
        p * (p.clamp_min(TINY).log() - q.clamp_min(TINY).log())
        for p, q in pairs
    ]
    return max(sum(terms).sum(1).mean().item(), 0.0)


def width_at(quantizers: Mapping[str, Mapping], bits: int) -> LayerBits:
    """A layer at ``bits``; operands that the quantizers leave in floating
    point stay there."""
    weight, activation = (
        FLOAT_BITS if quantizers[role]['bits'] == FLOAT_BITS else bits
        for role in ROLES
    )
    return LayerBits(weight, activation, '')


@contextmanager
def at_bits(
    network: nn.Module,
    widths: Mapping[str, LayerBits],
    quantizers: Mapping[str, dict],
    images: Tensor,
) -> Iterator[None]:
    """While active, quantized layers have other quantizers, calibrated.

    Args:
        network: In evaluation mode.
        widths: Name of a quantized layer -> its bits; others stay as they are.
        quantizers: ``dict(weight=..., activation=...)``, as of JointQAT.
        images: To calibrate with, (N, C, H, W), preprocessed.
    """
    before = {}
    for name, width in widths.items():
        layer = network.get_submodule(name)
        before[layer] = layer.weight_quantizer, layer.input_quantizer
        pairs = zip(ROLES, (width.weight, width.activation), strict=True)
        new = [
            build_quantizer(quantizers[role], role, layer, bits)
            for role, bits in pairs
        ]
        set_quantizers(layer, *(q.to(images.device).eval() for q in new))
    try:
        with torch.no_grad():
            calibrate(network, partial(network, images, mode='tensor'))
        yield
    finally:
        for layer, old in before.items():
            set_quantizers(layer, *old)


def loss_at(
    validation: Validation,
    quantizers: Mapping[str, dict],
    images: Tensor,
    widths: Mapping[str, LayerBits],
) -> Loss:
    """What the network of a validation loses with some layers at other bits;
    the arguments are those of :func:`at_bits`."""
    with at_bits(validation.network, widths, quantizers, images):
        return validation.loss()


def set_quantizers(
    layer: nn.Module, weight: nn.Module, activation: nn.Module
) -> None:
    """Exchange the quantizers of a quantized layer."""
    layer.weight_quantizer, layer.input_quantizer = weight, activation


def as_they_are(
    network: nn.Module, layers: Sequence[str], image: Tensor
) -> dict[str, Choice]:
    """Name of each quantized layer -> how it is run now.

    Args:
        network: In evaluation mode.
        layers: Names.
        image: (1, C, H, W), for which bit-operations are counted.
    """
    costs = {cost.name: cost for cost in layer_costs(network, image)}
    found = {}
    for name in layers:
        layer: Any = network.get_submodule(name)
        widths = (operand_bits(layer, role) for role in ('weight', 'input'))
        width = LayerBits(*widths, '')
        products = costs[name].multiply_adds if name in costs else 0
        found[name] = Choice(width, layer.product_weight.numel(), products)
    return found


def sensitivities(
    layers: Mapping[str, Choice],
    bits: Sequence[int],
    quantizers: Mapping[str, Mapping],
    measure: Callable[[Mapping[str, LayerBits]], Loss],
) -> Iterator[tuple[str, Choice]]:
    """Name and choice of each layer at each of ``bits``, alone.

    A layer that has these bits already stays as it is, and loses nothing.

    Args:
        layers: Result of :func:`as_they_are`.
        bits: Widths.
        quantizers: See :func:`width_at`.
        measure: Gives the loss with these layers at these bits.
    """
    for name, layer in layers.items():
        for count in bits:
            width = width_at(quantizers, count)
            same = width == layer.width
            loss = Loss() if same else measure({name: width})
            yield name, replace(layer, width=width, loss=loss)
