"""Tables of sensitivity.md: proposals, and networks trained with them."""

import json

from mmauxq.text import table

from .records import LOGS, rows

RUNS = (
    ('r20_drop1', 'ResNet-20', '--max-drop 1'),
    ('r20_drop3', 'ResNet-20', '--max-drop 3'),
    ('r20_18k', 'ResNet-20', '--size 18KiB'),
    ('r8_drop1', 'ResNet-8', '--max-drop 1'),
    ('r8_drop3', 'ResNet-8', '--max-drop 3'),
    ('r8_8k', 'ResNet-8', '--size 8KiB'),
    ('r8_6000', 'ResNet-8', '--size 6000'),
)
"""``sensitivity.json`` of a command, network, and its budget."""


def read(name: str) -> dict:
    """The ``sensitivity.json`` of a command."""
    return json.loads((LOGS / f'sensitivity/{name}.json').read_text())


def plain_recipe(found: dict) -> dict:
    """Bytes and bit-operations at W2A2 with a float first and last layer."""
    layers = list(found['layers'].values())
    chosen = [layers[0][0], layers[-1][0]]
    chosen += [
        next(each for each in layer if each['bits']['weight'] == 2)
        for layer in layers[1:-1]
    ]
    return {
        key: sum(each[key] for each in chosen)
        for key in ('size', 'bit_operations')
    }


def proposals() -> str:
    """What was proposed for each budget, and what it loses."""
    lines, last = [], None
    for name, network, budget in RUNS:
        found = read(name)
        if network != last:
            whole = sum(each[0]['size'] for each in found['layers'].values())
            lines.append([network, '', 'as it is', f'{whole:,}', '', ''])
            last = network
        for title, each in found['proposals'].items():
            lines.append(
                [
                    network,
                    f'`{budget}`',
                    title.partition(', ')[2],
                    f'{each["size"]:,}',
                    f'{each["predicted"]["drop"]:.2f}',
                    f'{each["measured"]["drop"]:.2f}',
                ]
            )
    head = ['network', 'budget', 'proposal', 'bytes of weights',
            'predicted drop', 'measured drop']  # fmt: skip
    return table(head, lines, 'lllrrr')


def trained() -> str:
    """Networks of the proposals, and the plain recipe, after training."""
    lines = []
    for name, what, records, title in (
        ('recipe', '`qat_r20_w2a2_digits`', 'r20_18k', None),
        ('18k', '`--size 18KiB`', 'r20_18k', 'at most 18,432 bytes'),
        ('drop1', '`--max-drop 1`, as measured', 'r20_drop1',
         'at most 1 points, as measured'),
    ):  # fmt: skip
        found = read(records)
        each, before = plain_recipe(found), ''
        if title:
            each = found['proposals'][title]
            before = f'{found["value"] - each["measured"]["drop"]:.2f}'
        log = rows(f'sensitivity/trained_{name}.json')
        after = [row for row in log if 'accuracy/top1' in row][-1]
        lines.append(
            [what, f'{each["size"]:,}', f'{each["bit_operations"] / 1e6:.1f}',
             before, f'{after["accuracy/top1"]:.2f}']
        )  # fmt: skip
    head = ['ResNet-20', 'bytes of weights', 'million bit-operations',
            'top-1 before training', 'after']  # fmt: skip
    return table(head, lines, 'lrrrr')


TABLES = {'sensitivity': proposals, 'sensitivity-trained': trained}
