"""Print the tables of map.md from the records in docs/logs/map.

python docs/map_tables.py
"""

from pathlib import Path

from mmauxq.compare.meta_comparison import Effect, effects
from mmauxq.compare.statistics import spread
from mmauxq.text import table

LOGS = Path(__file__).parent / 'logs' / 'map'
FROM_FLOAT = {
    'fmnist_float': 'W2A2',
    'fmnist_w1a2': 'W1A2, DoReFa weights',
    'fmnist_w3a3': 'W3A3',
    'fmnist_depth56': '56 layers',
    'fmnist_depth110': '110 layers',
    'fmnist_two_stages': 'start trained with the module',
    'fmnist_dorefa': 'DoReFa',
    'fmnist_pact': 'DoReFa weights, PACT',
    'fmnist_noskip': 'no skip connections',
    'fmnist_narrow': 'narrow',
    'fmnist_narrow_w1a1': 'narrow, short, W1A1',
    'fmnist_narrow_w1a1_lr3e-3': 'the same, learning rate 3e-3',
    'fmnist_narrow_module': 'narrow, short',
}
"""Records -> setting, of those from a float network."""
BESIDE_FLOAT = {
    'fmnist_w4a4': '20 layers',
    'fmnist_narrow_w4a4': 'narrow, short, float of 8,192 images',
    'fmnist_narrow_bits': 'narrow, short',
}
"""Records -> setting, of those beside a float network trained on."""
SCRATCH = {
    'digits_scratch': 'W2A2',
    'digits_w1a2': 'W1A2, DoReFa weights',
    'digits_w3a3': 'W3A3',
    'digits_w4a4': 'W4A4',
    'digits_dorefa': 'DoReFa',
    'digits_pact': 'DoReFa weights, PACT',
    'digits_noskip': 'no skip connections',
    'digits_wide': 'twice the width',
    'digits_depth56': '56 layers',
    'digits_depth110': '110 layers',
    'digits_lr0.05': 'learning rate 0.05',
    'digits_lr0.2': 'learning rate 0.2',
    'digits_lr0.4': 'learning rate 0.4',
    'digits_lr0.8': 'learning rate 0.8',
}
"""Records -> setting, of those from random weights."""
ARMS = {
    'plain': 'W4A4',
    'aux': 'module',
    'w03': 'module, weight 0.3',
    'w01': 'module, weight 0.1',
    'anneal': 'module, weight brought to 0',
    'own': 'module, batch norms of its own',
    'narrow': 'module, quarter width',
    'quarter': 'module, quarter width',
    'ends': 'module, taps at stage ends',
    'preadd': 'module, taps before the sums',
    'auxself': 'module, which teaches F',
    'kd': 'teacher, temperature 1',
    'kd4': 'teacher',
    'auxkd4': 'module and teacher',
    'auxall4': 'module and teacher, teaching each other',
    'dsn': 'deep supervision, weight 1',
    'dsn01': 'deep supervision, weight 0.1',
    'channels': 'W4A4, a scale for each channel',
    'w4': 'W4A4',
    'w8': 'W8A8',
}
"""Name in the records -> what it is."""


def arm(effect: Effect) -> str:
    """What an arm is; beside a float network, its bits, too."""
    name = ARMS[effect.arm]
    if effect.setting in BESIDE_FLOAT and not name.startswith('W'):
        name = f'W4A4 with {name}'
    return name


def rows(settings: dict[str, str], reference: str, what: str) -> str:
    """A table with a row for each arm of each setting."""
    lines, last = [], None
    for effect in effects([LOGS / name for name in settings]):
        first = effect.setting != last
        last = effect.setting
        lines.append(
            [
                settings[effect.setting] if first else '',
                spread(effect.reference) if first else '',
                arm(effect),
                str(effect.difference).removesuffix(' above'),
                f'`{effect.setting}`' if first else '',
            ]
        )
    head = ['setting', reference, what, 'difference, wins', 'records']
    return table(head, lines)


def tables() -> list[str]:
    """All of them, in the order of the page."""
    return [
        rows(FROM_FLOAT, 'plain, top-1', 'guidance'),
        rows(BESIDE_FLOAT, 'float, top-1', 'network'),
        rows(SCRATCH, 'plain, top-1', 'guidance'),
    ]


if __name__ == '__main__':
    print('\n'.join(tables()))
