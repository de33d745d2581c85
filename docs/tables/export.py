"""Tables of export.md: exported forms in their runtimes."""

from functools import partial

from benchmarks.formats.page import ALIGN, HEAD, cells
from mmauxq.compare.comparison import by_arm, collect
from mmauxq.compare.statistics import spread
from mmauxq.text import table

from .records import LOGS, rows
from .runs import finals, paired, without_wins

MOBILE = {
    'floatcont': 'float, trained on',
    'qat-w4a16': 'W4A16',
    'aux-w4a16': 'W4A16 with the module',
    'qat-w4a8': 'W4A8',
    'aux-w4a8': 'W4A8 with the module',
    'qat-w2a8': 'W2A8',
    'aux-w2a8': 'W2A8 with the module',
}
"""Arm -> what it is."""


def latest_formats(network: str) -> dict[str, dict]:
    """W/A/FORM/RUNTIME -> the last row of it, also where it was refused."""
    found = rows(f'formats_{network}.jsonl', failed=True)
    return {row['arm']: row for row in found}


def formats(network: str) -> str:
    """What ``python -m benchmarks.formats`` found of a network."""
    return table(HEAD, map(cells, latest_formats(network).values()), ALIGN)


def mobile() -> str:
    """Bits of phones, beside the float network that was trained on."""
    folder = LOGS / 'fmnist_mobile_bits'
    found = finals(folder)
    runs = by_arm(collect(folder))['floatcont']
    float_network = found['floatcont']
    start = {seed: run['float_final'] for seed, run in runs.items()}
    lines = [
        [
            'float, at the start',
            spread(list(start.values())),
            without_wins(paired(start, float_network)),
        ]
    ]
    for arm, name in MOBILE.items():
        beside = ''
        if arm != 'floatcont':
            beside = without_wins(paired(found[arm], float_network))
        lines.append([name, spread(list(found[arm].values())), beside])
    head = ['network', 'top-1', 'difference to float trained on']
    return table(head, lines)


TABLES = {
    'formats-resnet20': partial(formats, 'r20'),
    'formats-resnet18': partial(formats, 'r18'),
    'mobile-bits': mobile,
}
