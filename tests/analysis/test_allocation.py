from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmauxq.analysis.allocation import (
    Choice,
    Loss,
    allocations,
    predicted,
    total_size,
    within_drop,
    within_size,
)
from mmauxq.layers import LayerBits


def layer(weights, losses):
    """A float layer, and at bits -> (drop, divergence)."""
    choices = [Choice(LayerBits(32, 32, ''), weights, 10)]
    return choices + [
        Choice(LayerBits(bits, bits, ''), weights, 10, Loss(*loss))
        for bits, loss in losses.items()
    ]


LAYERS = dict(
    first=layer(8, {8: (0.0, 0.1), 4: (1.0, 0.4), 2: (9.0, 3.0)}),
    second=layer(80, {8: (-0.5, 0.1), 4: (0.5, 0.8), 2: (2.0, 0.9)}),
)


def widths(allocation):
    return [choice.width.weight for choice in allocation.values()]


def test_the_path_takes_the_cheapest_bytes_first():
    """Prices: second 0.1/240, then past 4 bits 0.8/60; first 0.1/24, 0.3/4,
    2.6/2."""
    path = allocations(LAYERS)
    assert list(map(widths, path)) == [
        [32, 32], [32, 8], [8, 8], [8, 2], [4, 2], [2, 2]
    ]  # fmt: skip
    assert list(map(total_size, path)) == [352, 112, 88, 28, 24, 22]


def test_a_choice_counts_bytes_and_bit_operations():
    choice = Choice(LayerBits(3, 8, ''), 11, 10)
    assert choice.size == 5  # 33 bits
    assert choice.bit_operations == 10 * 3 * 8


def test_a_gain_is_predicted_as_nothing():
    loss = predicted(allocations(LAYERS)[2])
    assert loss.drop == 0
    assert loss.divergence == pytest.approx(0.2)


divergences = st.floats(0.001, 10)
drawn = st.lists(
    st.tuples(st.integers(1, 50), divergences, divergences, divergences),
    min_size=1,
    max_size=4,
)


@given(drawn)
def test_no_network_as_small_as_one_of_the_path_is_nearer(sizes):
    layers = {
        f'layer{i}': layer(8 * n, {8: (0, a), 4: (0, b), 2: (0, c)})
        for i, (n, a, b, c) in enumerate(sizes)
    }
    every = [
        dict(zip(layers, chosen, strict=True))
        for chosen in product(*layers.values())
    ]
    path = allocations(layers)
    assert total_size(path[-1]) == min(map(total_size, every))
    for allocation in path:
        size, loss = total_size(allocation), predicted(allocation).divergence
        best = min(
            predicted(other).divergence
            for other in every
            if total_size(other) <= size
        )
        assert loss <= best * (1 + 1e-9) + 1e-12


def test_layers_that_are_small_already_stay():
    base = Choice(LayerBits(2, 2, ''), 8, 10)
    other = Choice(LayerBits(8, 8, ''), 8, 10, Loss(0.0, 0.1))
    assert allocations(dict(layer=[base, other])) == [dict(layer=base)]


@pytest.mark.parametrize(
    'size, expected',
    [(1000, [32, 32]), (112, [32, 8]), (111, [8, 8]), (22, [2, 2])],
)
def test_within_a_size(size, expected):
    proposal = within_size(
        allocations(LAYERS), size, lambda a: Loss(sum(widths(a)), 1.0)
    )
    assert widths(proposal.allocation) == expected
    assert proposal.loss == Loss(sum(expected), 1.0)


def test_within_a_drop_as_predicted_if_that_holds():
    path = allocations(LAYERS)
    first, last = within_drop(path, 2.5, lambda a: Loss(0.3, 0.0))
    assert widths(first.allocation) == [8, 2]  # 2.0; the next has 3.0
    assert first is last and first.loss.drop == 0.3
    assert (first.size, first.predicted.drop) == (28, 2.0)


@pytest.mark.parametrize('fits', range(6))
def test_within_a_drop_as_measured_where_the_prediction_fails(fits):
    """Networks of the path up to ``fits`` lose little, all others much."""
    path, seen = allocations(LAYERS), []

    def measure(allocation):
        seen.append(path.index(allocation))
        return Loss(0.5 if seen[-1] <= fits else 50.0)

    first, last = within_drop(path, 20.0, measure)
    assert widths(first.allocation) == [2, 2]
    assert last.allocation == path[fits]
    assert last.loss.drop == (0.5 if fits else 0.0)
    assert len(seen) == len(set(seen)) <= 4


def test_a_network_that_must_lose_nothing_can_stay_as_it_is():
    _, last = within_drop(allocations(LAYERS), 0.0, lambda a: Loss(0.1))
    assert widths(last.allocation) == [32, 32]
    assert last.loss == Loss()
