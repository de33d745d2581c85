"""Bits for each layer, from what each choice loses and what it takes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmauxq.layers import LayerBits


@dataclass(frozen=True)
class Loss:
    """What a network loses against the one before.

    Args:
        drop: Of the metric, in its points; negative if it gained.
        divergence: Mean over images of the Kullback-Leibler divergence of the
            scores of classes from those before, in nats.
    """

    drop: float = 0.0
    divergence: float = 0.0


@dataclass(frozen=True)
class Choice:
    """One way to run a layer.

    Args:
        width: Bits of its weight and of its input.
        weights: Their number.
        multiply_adds: For one image.
        loss: Of the network if this layer alone is run that way; nothing for
            the layer as it is.
    """

    width: LayerBits
    weights: int
    multiply_adds: int
    loss: Loss = Loss()

    @property
    def size(self) -> int:
        """Bytes of its weight."""
        return math.ceil(self.weights * self.width.weight / 8)

    @property
    def bit_operations(self) -> int:
        """Multiply-adds times the bits of both operands."""
        return self.multiply_adds * self.width.weight * self.width.activation


Allocation = Mapping[str, Choice]
"""Name of a layer -> how it is run."""


@dataclass(frozen=True)
class Proposal:
    """Bits for all layers at once, and what was measured with them."""

    allocation: Allocation
    loss: Loss

    @property
    def size(self) -> int:
        """Bytes of the weights of all layers."""
        return total_size(self.allocation)

    @property
    def bit_operations(self) -> int:
        """Of all layers, for one image."""
        return sum(c.bit_operations for c in self.allocation.values())

    @property
    def predicted(self) -> Loss:
        """See :func:`predicted`."""
        return predicted(self.allocation)


def total_size(allocation: Allocation) -> int:
    """Bytes of the weights of all layers."""
    return sum(choice.size for choice in allocation.values())


def predicted(allocation: Allocation) -> Loss:
    """The sum over layers, as if each lost the same beside the others.

    A layer that alone seems to gain counts as 0: on few images that is chance.
    """
    losses = [choice.loss for choice in allocation.values()]
    return Loss(
        sum(max(loss.drop, 0.0) for loss in losses),
        sum(loss.divergence for loss in losses),
    )


def allocations(layers: Mapping[str, Sequence[Choice]]) -> list[Allocation]:
    """All layers as they are, and then always smaller networks, by a step in
    one layer each.

    For each Lagrange multiplier - a price of a byte in divergence - the best
    choice of a layer lies on the lower convex hull of its divergence over its
    size, and is independent of the other layers. These are the optima from
    the price 0 on, if the divergence of the network is the sum over layers.

    Sources: Shoham and Gersho, Efficient bit allocation for an arbitrary set
    of quantizers, IEEE Trans. ASSP 36(9), 1988, for the allocation; Cai et
    al., ZeroQ, arXiv:2001.00281, for the divergence and its sum.

    Args:
        layers: Name of a layer -> its choices; the first is the layer as it
            is.
    """
    current = {name: choices[0] for name, choices in layers.items()}
    path = [dict(current)]
    steps = [
        (price, name, choice)
        for name, choices in layers.items()
        for price, choice in _hull(choices)
    ]
    # the prices of a layer ascend, and sorting keeps the order of equal ones
    for _, name, choice in sorted(steps, key=lambda step: step[0]):
        current[name] = choice
        path.append(dict(current))
    return path


def _hull(choices: Sequence[Choice]) -> list[tuple[float, Choice]]:
    """Price and choice of each step down the lower convex hull."""
    steps: list[tuple[float, Choice]] = []
    current = choices[0]

    def price(choice: Choice) -> float:
        more = choice.loss.divergence - current.loss.divergence
        return more / (current.size - choice.size)

    while smaller := [c for c in choices if c.size < current.size]:
        best = min(smaller, key=lambda choice: (price(choice), choice.size))
        steps.append((price(best), best))
        current = best
    return steps


def within_size(
    path: Sequence[Allocation],
    size: int,
    measure: Callable[[Allocation], Loss],
) -> Proposal:
    """The first network of a path that takes at most ``size`` bytes, which
    must be at least what the last takes; ``measure`` gives what it loses."""
    chosen = next(a for a in path if total_size(a) <= size)
    return Proposal(chosen, measure(chosen))


def within_drop(
    path: Sequence[Allocation],
    drop: float,
    measure: Callable[[Allocation], Loss],
) -> tuple[Proposal, Proposal]:
    """The smallest network of a path that loses at most ``drop`` points, as
    predicted, and as measured.

    If the first loses more than predicted, the second lies before it on the
    path, where bisection finds it; else both are the same.
    """
    at = max(
        i
        for i in range(len(path))
        if all(predicted(a).drop <= drop for a in path[: i + 1])
    )
    first = best = Proposal(path[at], measure(path[at]))
    if first.loss.drop <= drop:
        return first, first
    best, low, high = Proposal(path[0], Loss()), 0, at
    while high - low > 1:
        middle = (low + high) // 2
        tried = Proposal(path[middle], measure(path[middle]))
        if tried.loss.drop <= drop:
            best, low = tried, middle
        else:
            high = middle
    return first, best
