"""Tables of map.md: settings in which guidance was compared."""

from functools import partial
from statistics import mean

from mmauxq.compare.meta_comparison import Effect, Overall, effects, together
from mmauxq.compare.statistics import (
    PairedDifference,
    clustered_interval,
    spread,
    with_interval,
)
from mmauxq.text import table

from . import records
from .records import QUARTER
from .runs import beside, difference, finals, side, with_wins, without_wins

LOGS = records.LOGS / 'map'
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
TINY = {'tiny_r18_quarter': 'ResNet-18, quarter width, W2A2'}
"""The same, on Tiny-ImageNet."""
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
    'auxkd': 'module and teacher, temperature 1',
    'auxall4': 'module and teacher, teaching each other',
    'dsn': 'deep supervision, weight 1',
    'dsn01': 'deep supervision, weight 0.1',
    'channels': 'W4A4, a scale for each channel',
    'w4': 'W4A4',
    'w8': 'W8A8',
}
"""Name in the records -> what it is. Others belong to another table."""
_NARROW, _ONE_BIT = 'digits_narrow_seeds', 'digits_w1a1_seeds'
FURTHER_AIMS = (
    ('the module, 0.5 points above plain training', 0.5, (
        ('narrow, digits, W2A2', (_NARROW, 'aux'), (_NARROW, 'plain')),
        ('digits, W1A1', (_ONE_BIT, 'aux'), (_ONE_BIT, 'plain')),
        ('quarter width, Tiny-ImageNet, W2A2', ('tiny_quarter_tuned', 'aux'),
         ('tiny_quarter_tuned', 'plain')),
    )),
    ('both, 0.5 points above a teacher alone', 0.5, (
        ('narrow, digits, W2A2', (_NARROW, 'auxkd'), (_NARROW, 'kd')),
        ('digits, W1A1', ('digits_w1a1', 'auxkd4'), ('digits_w1a1', 'kd4')),
        ('quarter width, Tiny-ImageNet, W2A2, wide teacher',
         (QUARTER, 'auxkdw4'), (QUARTER, 'kdw4')),
    )),
    ('W2A2, at most 0.3 points below float trained on', -0.3, (
        ('whole width, Tiny-ImageNet, plain', ('tiny_rates', 'plain'),
         ('tiny_rates', 'on')),
        ('the same, wide teacher', ('tiny_teachers', 'kdw4'),
         ('tiny_rates', 'on')),
    )),
    ('W4A4, at most 0.1 points below float trained on', -0.1, (
        ('Fashion-MNIST, plain', ('map/fmnist_w4a4', 'plain'),
         ('map/fmnist_w4a4', 'floatcont')),
        ('narrow, Fashion-MNIST, plain', ('map/fmnist_narrow_w4a4', 'plain'),
         ('map/fmnist_narrow_w4a4', 'floatcont')),
        ('quarter width, Tiny-ImageNet, plain', (QUARTER, 'w4'),
         (QUARTER, 'on')),
        ('the same, wide teacher', (QUARTER, 'w4wide'), (QUARTER, 'on')),
    )),
)  # fmt: skip
"""Aim, the least difference that it asks for, and where it was tried: the
setting, and the two arms of the difference."""


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
        if effect.arm not in ARMS:
            continue
        first = effect.setting != last
        last = effect.setting
        lines.append(
            [
                settings[effect.setting] if first else '',
                spread(effect.reference) if first else '',
                arm(effect),
                with_wins(effect.difference),
                f'`{effect.setting}`' if first else '',
            ]
        )
    head = ['setting', reference, what, 'difference, wins', 'records']
    return table(head, lines)


NEARLY_KEPT = tuple(
    f'fmnist_{name}'
    for name in ('float', 'w1a2', 'w3a3', 'depth56', 'depth110', 'dorefa',
                 'pact', 'noskip', 'narrow')
)  # fmt: skip
"""Records of the settings that low bits nearly keep."""


def overall(reference: str, *more: str) -> dict[str, Overall]:
    """Arm -> over the settings that low bits nearly keep, and more."""
    folders = [LOGS / name for name in (*NEARLY_KEPT, *more)]
    return {arm.name: arm for arm in together(effects(folders, reference))}


def together_rows() -> str:
    """Guidance over the settings that low bits nearly keep."""
    found, lines = overall('plain', 'fmnist_two_stages'), []
    for name, shown in (
        ('kd4', 'a teacher'), ('aux', 'the module'), ('auxkd4', 'both'),
    ):  # fmt: skip
        arm = found[name]
        clustered = with_interval(*clustered_interval(arm.pairs))
        lines.append(
            [shown, len(arm.effects), without_wins(arm.difference),
             sum(map(len, arm.pairs)), clustered]
        )  # fmt: skip
    head = ['guidance', 'settings', 'mean of settings', 'pairs',
            'mean of pairs, clustered']  # fmt: skip
    return table(head, lines)


def rates() -> str:
    """Each learning rate from scratch; the best of a column is bold."""
    folders = {
        '0.05': 'digits_lr0.05',
        '0.1': 'digits_scratch',
        '0.2': 'digits_lr0.2',
        '0.4': 'digits_lr0.4',
        '0.8': 'digits_lr0.8',
    }
    runs = {rate: finals(LOGS / name) for rate, name in folders.items()}
    arms = ('plain', 'aux', 'kd4')
    best = [
        max(mean(of[arm].values()) for of in runs.values() if arm in of)
        for arm in arms
    ]
    lines = []
    for rate, of in runs.items():
        cells = [rate]
        for arm, most in zip(arms, best, strict=True):
            found = list(of.get(arm, {}).values())
            shown = spread(found) if found else ''
            bold = found and mean(found) == most
            cells.append(f'**{shown}**' if bold else shown)
        lines.append(cells)
    head = ['learning rate', 'plain', 'with the module', 'with a teacher']
    return table(head, lines)


def aims() -> str:
    """The aims, and whether the interval of a difference settles them."""
    deep, low = LOGS / 'fmnist_depth56', LOGS / 'fmnist_narrow_w1a1'
    lines = []
    for what, arm, reference, least, more in (
        ('both, 0.5 points above a teacher alone', 'auxkd4', 'kd4', 0.5, ()),
        ('the module, better than plain training', 'aux', 'plain', 0.0,
         ('fmnist_two_stages',)),
        ('the module, worse than a teacher by less than 0.1', 'aux', 'kd4',
         -0.1, ()),
    ):  # fmt: skip
        found = [overall(reference, *more)[arm].difference]
        found += [difference(place, arm, reference) for place in (deep, low)]
        lines.append([what, *(settled(each, least) for each in found)])
    return table(['aim', 'nearly kept', '56 layers', 'W1A1'], lines)


def settled(found: PairedDifference, least: float) -> str:
    """Whether its interval lies above an aim, and the interval."""
    verdict = {1: 'yes', -1: 'no', 0: 'not shown'}[side(found, least)]
    return f'{verdict}: {without_wins(found)}'


def further_aims() -> str:
    """The aims where low bits lose much, and those beside float."""
    lines = []
    for aim, least, settings in FURTHER_AIMS:
        for setting, *pair in settings:
            lines.append([aim, setting, settled(beside(*pair), least)])
            aim = ''
    return table(['aim', 'setting', 'reached'], lines)


def tiny_losses() -> str:
    """What plain training loses to the float network of its seed."""
    (folder,) = TINY
    kept = max(effects([LOGS / folder]), key=lambda each: len(each.start))
    loss = without_wins(kept.loss)
    line = [TINY[folder], spread(kept.start), spread(kept.reference), loss]
    head = ['setting', 'float, top-1', 'plain, top-1', 'float above plain']
    return table(head, [line])


TABLES = {
    'map-together': together_rows,
    'map-from-float': partial(rows, FROM_FLOAT, 'plain, top-1', 'guidance'),
    'map-tiny-losses': tiny_losses,
    'map-tiny': partial(rows, TINY, 'plain, top-1', 'guidance'),
    'map-beside-float': partial(rows, BESIDE_FLOAT, 'float, top-1', 'network'),
    'map-scratch': partial(rows, SCRATCH, 'plain, top-1', 'guidance'),
    'map-rates': rates,
    'map-aims': aims,
    'map-further-aims': further_aims,
}
