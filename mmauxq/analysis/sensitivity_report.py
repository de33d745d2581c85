"""The report of a sensitivity analysis, for people and for programs."""

from dataclasses import asdict
from typing import Any

from mmauxq.text import table

from .allocation import Choice, Proposal, total_size
from .sensitivity import Sensitivity

LOST = """\
{metric} is {value:.2f} on {images} validation images. What is lost of it, in \
points, and in parentheses the Kullback-Leibler divergence of the scores in \
thousandths of a nat, when one layer alone goes to these bits, without \
training:

"""
COSTS = """
Bytes of the weights of each layer, and millions of bit-operations \
(multiply-adds times the bits of both operands) for one image:

"""
KEPT = """
Float in any case: {}.
"""
PROPOSED = """
Proposed bits, all layers at once, without training:

"""
POLICY = """\
# Bits for each layer, proposed by mmauxq sensitivity:
# {size:,} bytes of weights instead of {before:,}; {metric} was {value:.2f}, \
loses
# {predicted:.2f} points as predicted, {measured:.2f} as measured, before \
training
{base}
model = dict(
    policy=dict(
        layers=[
{rows}
        ]
    )
)
"""


def label(choice: Choice) -> str:
    """Bits for people: ``'4'``, ``'float'``, or ``'W4A32'``."""
    width = choice.width
    if width.is_float:
        return 'float'
    if width.weight == width.activation:
        return str(width.weight)
    return f'W{width.weight}A{width.activation}'


def as_markdown(found: Sensitivity, proposals: dict[str, Proposal]) -> str:
    """Tables of what is lost, of what it costs, and of what is proposed.

    Args:
        found: What was measured.
        proposals: How a proposal was found -> it; the last one stands beside
            the layers.
    """
    page = LOST.format_map(vars(found))
    page += _lost(found, proposals)
    page += COSTS + _costs(found)
    if found.float_layers:
        kept = (f'{name} ({why})' for name, why in found.float_layers.items())
        page += KEPT.format(', '.join(kept))
    if proposals:
        page += PROPOSED + proposals_table(found, proposals)
    return page


def _lost(found: Sensitivity, proposals: dict[str, Proposal]) -> str:
    *_, choices = found.layers.values()
    head = ['layer', 'now', *(f'at {label(c)}' for c in choices[1:])]
    *_, last = [None, *proposals.values()]
    rows = []
    for name, (base, *others) in found.layers.items():
        cells = [name, label(base), *map(_loss, others)]
        rows.append(cells + ([label(last.allocation[name])] if last else []))
    head += ['proposed'] * (last is not None)
    return table(head, rows, 'l' + 'r' * (len(head) - 1))


def _loss(choice: Choice) -> str:
    loss = choice.loss
    return f'{loss.drop:.2f} ({1e3 * loss.divergence:.3g})'


def _costs(found: Sensitivity) -> str:
    *_, choices = found.layers.values()
    labels = ['now', *(f'at {label(c)}' for c in choices[1:])]
    head = ['layer', *(f'bytes {x}' for x in labels)]
    rows = [
        [name]
        + [f'{choice.size:,}' for choice in choices]
        + [f'{choice.bit_operations / 1e6:,.4g}' for choice in choices]
        for name, choices in found.layers.items()
    ]
    head += [f'bit-operations {x}' for x in labels]
    return table(head, rows, 'l' + 'r' * (len(head) - 1))


def proposals_table(found: Sensitivity, proposals: dict[str, Proposal]) -> str:
    """Size, cost, predicted and measured loss of each proposal."""
    base = [choices[0] for choices in found.layers.values()]
    before = sum(choice.bit_operations for choice in base)
    size = sum(choice.size for choice in base)
    rows = [['as it is', f'{size:,}', f'{before / 1e6:,.4g}', *[''] * 4]]
    for name, proposal in proposals.items():
        rows.append([
            name,
            f'{proposal.size:,}',
            f'{proposal.bit_operations / 1e6:,.4g}',
            *(
                f'{value:.{digits}f}'
                for loss in (proposal.predicted, proposal.loss)
                for value, digits in ((loss.drop, 2), (loss.divergence, 4))
            ),
        ])  # fmt: skip
    head = [
        'bits', 'bytes of weights', 'million bit-operations',
        f'{found.metric}, predicted drop', 'predicted divergence',
        'measured drop', 'measured divergence',
    ]  # fmt: skip
    return table(head, rows, 'lrrrrrr')


def as_json(
    found: Sensitivity, proposals: dict[str, Proposal]
) -> dict[str, Any]:
    """Everything that was measured, for JSON."""
    return dict(
        metric=found.metric,
        value=found.value,
        images=found.images,
        layers={
            name: [_entry(choice) for choice in choices]
            for name, choices in found.layers.items()
        },
        float_layers=found.float_layers,
        proposals={
            name: dict(
                size=proposal.size,
                bit_operations=proposal.bit_operations,
                predicted=asdict(proposal.predicted),
                measured=asdict(proposal.loss),
                layers={
                    name: _by_role(choice)
                    for name, choice in proposal.allocation.items()
                },
            )
            for name, proposal in proposals.items()
        },
    )


def _by_role(choice: Choice) -> dict[str, int]:
    return dict(weight=choice.width.weight, activation=choice.width.activation)


def _entry(choice: Choice) -> dict[str, Any]:
    return dict(
        bits=_by_role(choice),
        weights=choice.weights,
        multiply_adds=choice.multiply_adds,
        size=choice.size,
        bit_operations=choice.bit_operations,
        **asdict(choice.loss),
    )


def as_policy(found: Sensitivity, proposal: Proposal, base: str | None) -> str:
    """The text of a config with the bits of a proposal.

    Args:
        found: What was measured.
        proposal: A list of pairs is made of it, which takes the place of all
            ``policy.layers`` of the recipe that inherits it.
        base: Path of the recipe that it is for; without one it is a part of a
            recipe.
    """
    rows = []
    for name, choice in proposal.allocation.items():
        bits: Any = _by_role(choice)
        if bits['weight'] == bits['activation']:
            bits = bits['weight']
        rows.append(f'            ({name!r}, {bits}),')
    before = {name: choices[0] for name, choices in found.layers.items()}
    return POLICY.format(
        size=proposal.size,
        before=total_size(before),
        metric=found.metric,
        value=found.value,
        predicted=proposal.predicted.drop,
        measured=proposal.loss.drop,
        base='' if base is None else f'_base_ = {base!r}\n',
        rows='\n'.join(rows),
    )
