"""Tables of experiments.md and results.md: what networks reach."""

import json
from functools import partial
from pathlib import Path
from statistics import median, quantiles

from mmauxq.compare.comparison import by_arm, collect
from mmauxq.compare.statistics import PairedDifference, spread
from mmauxq.text import table

from .records import LOGS, QUARTER, number, rows
from .runs import (
    arm_rows,
    arms,
    finals,
    paired,
    side,
    top1_by_seed,
    with_wins,
    without_wins,
)

BESIDE_PLAIN = 'difference to plain, 95% interval, wins'
BESIDE_OURS = 'difference to ours, 95% interval, wins'
RATES = {
    'plain': 'plain',
    'tr': "`tr`: the schedule, weights' steps stand still",
    'trsteps': '`trsteps`: the schedule, their steps are trained',
    'l1': '`l1`: `L1ScaledWeight` for each channel',
    'l1tr': '`l1tr`: both',
}
BLOCKS = {
    'plain': 'plain',
    'freeze': '`OscillationFreezingHook`',
    'bwr': '`BlockReplacement`',
    'bwr01': '`BlockReplacement` with a weight of 0.1',
    'kd': 'a teacher',
    'aux': 'the module',
    'auxkd': 'the module and a teacher',
}
TECHNIQUES = {
    'plain': 'plain',
    'kd': 'a teacher, temperature 1',
    'aux': 'the module',
    'auxkd': 'the module and a teacher',
    'bwr': '`BlockReplacement`',
    'freeze': '`OscillationFreezingHook`',
    'norms': '`BatchNormHook`',
    'rates': '`TransitionRateScheduleHook`',
    'l1': '`L1ScaledWeight` for each channel',
    'on': 'float, trained on',
}
TEACHERS = (
    ('tiny_rates', 'plain', 'none'),
    ('tiny_rates', 'kd', 'F in float, temperature 1'),
    ('tiny_teachers', 'kd4', 'F in float, temperature 4'),
    ('tiny_wide_temperature_1', 'kdw', 'twice as wide, temperature 1'),
    ('tiny_teachers', 'kdw4', 'twice as wide, temperature 4'),
    ('tiny_rates', 'on', 'float, trained on'),
)
DIGITS_TEACHERS = (
    ('digits_wide_teacher', 'plain', 'none'),
    ('digits_wide_teacher', 'kd4', 'F in float'),
    ('digits_wide_teacher', 'kdw4', 'ResNet-20 (8-16-32)'),
    ('digits_wide_teacher_rates', 'kdw4', 'the same, lower rates'),
    ('digits_wide_teacher', 'aux', 'none, but the module'),
    ('digits_wide_teacher', 'auxkdw4', 'ResNet-20 (8-16-32) and the module'),
    ('digits_wide_teacher', 'on', 'float, trained on'),
)
FOUR_BITS = (
    (QUARTER, 'w4', 'none'),
    (QUARTER, 'w4wide', 'the wide network'),
    (QUARTER, 'on', 'float, trained on'),
)
TWO_BITS = (
    (QUARTER, 'plain', 'none'),
    (QUARTER, 'kdw4', 'the wide network'),
    (QUARTER, 'auxkdw4', 'the wide network and the module'),
    (QUARTER, 'on', 'float, trained on'),
)
"""Each: comparison, arm, what it is; plain training first, float last."""
WEIGHTS = {
    'lsq': '`LSQ`, a step for each tensor',
    'channels': '`LSQ`, a step for each output channel',
    'l1': '`L1ScaledWeight` for each output channel',
}
PEERS = {
    'plain': 'ours, LSQ',
    'mmrazor': 'MMRazor, LSQ',
    'best': 'Brevitas, set up for 2 bits',
    'brevitas': 'Brevitas, its usual learned scales',
}
QUICK = {'plain': 'plain W2A2', 'module': 'W2A2 with the module'}
NARROW = {
    'plain': 'none',
    'aux': 'the module',
    'kd4': 'a teacher, temperature 4',
    'auxkd4': 'both',
    'kd': 'a teacher, temperature 1',
}
STRATEGIES = {
    'plain': 'none',
    'dsn': 'deep supervision, weight 1',
    'kd': 'a teacher',
    'aux': 'the module',
    'auxkd': 'the module and a teacher',
    'auxself': 'the module, which teaches F',
}
GUIDANCE = {
    'plain': 'none',
    'dsn': 'deep supervision',
    'kd': 'a teacher',
    'kd4': 'a teacher, temperature 4',
    'aux': 'the module',
    'auxkd': 'both',
    'auxkd4': 'both',
    'on': 'float, trained on',
}
OWN = {
    'plain': 'plain',
    'aux': 'the module, one pass',
    'own': 'the module, a second pass',
}
PRECISION = {
    'qat': 'plain W2A2',
    'qat-bf16': 'plain W2A2',
    'aux': 'with the module',
    'aux-bf16': 'with the module',
    'auxhalf': 'the module alone; F is in bfloat16 on both sides',
    'aux-half': 'the module alone; F is in bfloat16 on both sides',
}
BITS = {'floatcont': 'float, trained on', 'w8': 'W8A8', 'w4': 'W4A4'}
"""Each: arm -> what it is."""


def bfloat16() -> str:
    """bfloat16 beside float32, for each recipe."""
    lines = []
    for task, folder, sides in (
        ('digits', 'digits_bf16',
         {'qat': 'qat-bf16', 'aux': 'aux-bf16'}),
        ('digits, on the CPU', 'digits_module_bf16', {'aux': 'aux-half'}),
        ('Tiny-ImageNet', 'map/tiny_r18_quarter',
         {'qat32': 'qat', 'aux32': 'aux'}),
        ('Tiny-ImageNet, other seeds', 'tiny_precision',
         {'qat32': 'qat', 'aux32': 'aux', 'aux': 'auxhalf'}),
    ):  # fmt: skip
        found = finals(LOGS / folder)
        for wide, narrow in sides.items():
            both = [found[wide], found[narrow]]
            seeds = sorted(set.intersection(*map(set, both)))
            shown = [spread([runs[seed] for seed in seeds]) for runs in both]
            beside = with_wins(paired(*reversed(both)))
            lines.append([task, PRECISION[narrow], len(seeds), *shown, beside])
    head = ['task', 'recipe', 'seeds', 'float32', 'bfloat16',
            'difference, 95% interval, wins']  # fmt: skip
    return table(head, lines)


def terms_of(folder: Path) -> dict:
    """What was settled when a comparison began, and the tuned values."""
    return json.loads((folder / 'comparison.json').read_text())


def present(folder: Path, names: dict[str, str]) -> dict[str, str]:
    """Those of the arms that a comparison has."""
    found = finals(folder)
    return {arm: name for arm, name in names.items() if arm in found}


def narrow_digits() -> str:
    """At the rate of the recipe, and at the best for each arm."""
    lines = []
    one, tuned = (
        {
            row[0]: row[1:]
            for row in arm_rows(folder, present(folder, BLOCKS), 'plain')
        }
        for folder in (LOGS / 'digits_narrow', LOGS / 'digits_narrow_tuned')
    )
    chosen = terms_of(LOGS / 'digits_narrow_tuned')['chosen']
    for arm, name in BLOCKS.items():
        untuned = one.get(name, ['', ''])
        lines.append([name, *untuned, chosen[arm], *tuned[name]])
    head = ['arm', 'top-1 at 0.1', BESIDE_PLAIN,
            'best rate', 'top-1 there', BESIDE_PLAIN]  # fmt: skip
    return table(head, lines)


def tuned(
    folder: Path, all_names: dict[str, str], beside: str = BESIDE_PLAIN
) -> str:
    """Arms with a rate chosen for each on images held out, beside the
    first of them."""
    terms, names = terms_of(folder), present(folder, all_names)
    values = terms['tuning']['values']
    lines = [
        [name, *(f'{top1:.2f}' for top1 in terms['held_out'][arm]),
         terms['chosen'][arm], *row]
        for arm, (name, *row) in zip(
            names, arm_rows(folder, names, next(iter(names))), strict=True
        )
    ]  # fmt: skip
    head = ['arm', *(f'held out, at {value}' for value in values),
            'chosen rate', 'top-1', beside]  # fmt: skip
    return table(head, lines)


def narrow_rates() -> str:
    """W1A2 on the narrow network, with other rates than the chosen ones."""
    own = finals(LOGS / 'digits_narrow_w1a2')

    def at(name: str) -> dict[int, float]:
        (arm,) = finals(LOGS / 'digits_narrow_w1a2_rates' / name).values()
        return arm

    module = {0.1: own['aux'], 0.2: at('aux0.2')}
    plain = {0.05: at('plain0.05'), 0.1: at('plain0.1'), 0.2: own['plain']}
    lines = [
        [
            rate,
            spread(list(arm.values())),
            *(with_wins(paired(mine, arm)) for mine in module.values()),
        ]
        for rate, arm in plain.items()
    ]
    head = ['plain, at', 'top-1']
    head += [f'the module, at {rate}, beside it' for rate in module]
    return table(head, lines)


def bits_and_decay() -> str:
    """Falling bits, and other weight decays, beside the plain recipe."""
    folder = LOGS / 'digits_falling_bits'
    plain = finals(folder)['plain']
    runs = {
        'W4A4 for the first half of the epochs': finals(folder)['falling'],
        **{
            f'weight decay {value}':
            finals(LOGS / 'digits_weight_decay' / value)['plain']
            for value in ('0', '3e-5', '5e-4')
        },
    }  # fmt: skip
    lines = [['the plain recipe', spread(list(plain.values())), '']]
    lines += [
        [name, spread(list(found.values())), with_wins(paired(found, plain))]
        for name, found in runs.items()
    ]
    return table(['', 'final top-1', BESIDE_PLAIN], lines)


def peers() -> str:
    """Quantizers of other tools, at the chosen rate and at 0.1."""
    folder = LOGS / 'digits_peers'
    found, chosen = finals(folder), terms_of(folder)['chosen']
    plain = found['plain']
    recipe = {**found, **finals(LOGS / 'digits_peers_0.1')}
    lines = []
    for arm, name in PEERS.items():
        top1 = spread(list(found[arm].values()))
        line = [name, chosen[arm], top1, '', '', '']
        if len(found[arm]) < len(plain):
            line[2] += f', {len(found[arm])} of {len(plain)} seeds'
        else:
            line[4] = spread(list(recipe[arm].values()))
            if arm != 'plain':
                line[3] = with_wins(paired(found[arm], plain))
                line[5] = with_wins(paired(recipe[arm], plain))
        lines.append(line)
    head = ['quantizers', 'chosen rate', 'top-1', BESIDE_OURS,
            'top-1 at 0.1', BESIDE_OURS]  # fmt: skip
    return table(head, lines)


def equal_time(folder: Path, guided: str = 'aux') -> str:
    """Plain training for longer, beside an arm with guidance; a comparison
    for each number of epochs."""
    counts = sorted(int(each.name) for each in folder.iterdir())
    runs = {count: finals(folder / str(count)) for count in counts}
    least = counts[0]
    plain, guidance = runs[least]['plain'], runs[least][guided]
    lines = [['float', '', float_networks(folder / str(least)), '', '', '']]
    for epochs, found in runs.items():
        for arm, own in found.items():
            line = [GUIDANCE[arm], epochs, spread(list(own.values()))]
            if arm == guided:
                line += [with_wins(paired(own, found['plain'])), '']
            else:
                line += ['', with_wins(paired(guidance, own))]
            beside = '' if own is plain else with_wins(paired(own, plain))
            lines.append([*line, beside])
    head = ['guidance', 'epochs', 'final top-1',
            'difference to none, as many epochs, wins',
            f'{GUIDANCE[guided]}, {least} epochs, beside it',
            f'difference to none, {least} epochs, wins']  # fmt: skip
    return table(head, lines)


def teachers(arms: tuple[tuple[str, str, str], ...]) -> str:
    """Arms of several comparisons from the same float networks."""
    lines = [['float, where all start', '', '',
              float_networks(LOGS / arms[0][0]), '', '']]  # fmt: skip
    plain, on = top1_by_seed(arms[0][:2]), top1_by_seed(arms[-1][:2])
    for name, arm, text in arms:
        terms, top1 = terms_of(LOGS / name), top1_by_seed((name, arm))
        settled = terms['optim_wrapper']['optimizer'].get('lr')
        rate = terms.get('chosen', {}).get(arm, settled)
        beside = [
            '' if top1 == other else with_wins(paired(top1, other))
            for other in (plain, on)
        ]
        lines.append(
            [text, rate, len(top1), spread([*top1.values()]), *beside]
        )
    head = ['teacher', 'rate', 'seeds', 'final top-1',
            'difference to none, wins',
            'difference to float trained on, wins']  # fmt: skip
    return table(head, lines)


def chosen_by_seeds() -> str:
    """What one seed and what several choose as the learning rate, and how the
    comparison ends with it."""
    lines = []
    for name in ('digits_teacher_one_seed', 'digits_teacher'):
        for epochs in (20, 30):
            folder = LOGS / name / str(epochs)
            terms, found = terms_of(folder), finals(folder)
            line = [len(terms['tuning']['seeds']), epochs]
            for arm in ('plain', 'kd4'):
                line += [terms['chosen'][arm], spread([*found[arm].values()])]
            beside = with_wins(paired(found['kd4'], found['plain']))
            lines.append([*line, beside])
    head = ['seeds that chose', 'epochs', 'rate of none', 'its top-1',
            'rate of a teacher', 'its top-1', 'difference, wins']  # fmt: skip
    return table(head, lines)


def guided_seconds(guided: str, names: dict[str, str]) -> str:
    """How long a run with guidance takes, beside the plain one.

    Args:
        guided: The arm with guidance.
        names: Folder of the records -> what was trained.
    """
    lines = []
    for folder, name in names.items():
        runs = by_arm(collect(LOGS / folder / '20'))
        parts = [
            run['seconds'] / runs['plain'][seed]['seconds']
            for seed, run in runs[guided].items()
        ]
        tenths = quantiles(parts, n=10, method='inclusive')
        shown = ' to '.join(f'{x:.2f}' for x in (tenths[0], tenths[-1]))
        lines.append([name, len(parts), f'{median(parts):.2f} ({shown})'])
    head = ['network', 'pairs', f'with {GUIDANCE[guided]}, of plain']
    return table(head, lines)


def own_floats(folder: Path) -> str:
    """Arms of which each seed has a float network of its own, beside plain
    training and beside the teacher alone."""
    names, found = present(folder, GUIDANCE), finals(folder)
    head = ['guidance', 'final top-1', 'difference to plain, wins']
    lines = arm_rows(folder, names, 'plain')
    teacher = next((arm for arm in ('kd', 'kd4') if arm in names), None)
    if teacher:
        head.append('difference to the teacher, wins')
        for arm, line in zip(names, lines, strict=True):
            beside = ''
            if arm not in ('plain', teacher):
                beside = with_wins(paired(found[arm], found[teacher]))
            line.append(beside)
    first = ['float', float_networks(folder), *[''] * (len(head) - 2)]
    return table(head, [first, *lines])


def float_networks(folder: Path) -> str:
    """What those reach from which the seeds start."""
    runs = by_arm(collect(folder))['plain'].values()
    return spread([run['float_final'] for run in runs])


def step_rates() -> str:
    """Learning rates of the steps, and of all."""
    lines = []
    for name, w2, w4 in (
        ('1e-3', ('module', 'plain'), ('bits', 'w4')),
        ('of the steps 0.1 of it', ('steps0.1', 'w2'), ('steps0.1', 'w4')),
        ('of the steps 0.3 of it', ('steps0.3', 'w2'), ('steps0.3', 'w4')),
        ('of the steps 3 times it', ('steps3', 'w2'), None),
        ('3e-3 for all', ('lr3e-3', 'w2'), None),
    ):
        cells = [name]
        for place in (w2, w4):
            if place is None:
                cells.append('')
                continue
            folder, arm = place
            runs = finals(LOGS / f'map/fmnist_narrow_{folder}')[arm]
            shown = spread(list(runs.values()))
            few = f' ({len(runs)} seeds)' if len(runs) < 3 else ''
            cells.append(shown + few)
        lines.append(cells)
    return table(['learning rate', 'W2A2', 'W4A4'], lines)


def own_batch_norms() -> str:
    """The module with batch norms of its own."""
    folder = LOGS / 'digits_w2a2_own'
    runs, lines = by_arm(collect(folder)), arm_rows(folder, OWN, 'plain')
    for arm, line in zip(OWN, lines, strict=True):
        seconds = median(run['step_seconds'] for run in runs[arm].values())
        line.append(f'{number(1e3 * seconds)} ms')
    return table(['', 'final top-1', BESIDE_PLAIN, 'step'], lines)


def epochs() -> str:
    """Top-1 of the recipes of Fashion-MNIST over their epochs."""
    shown, lines = (1, 5, 10, 15, 20), []
    for name in (
        'float_r20_fmnist', 'qat_r20_w2a2_fmnist', 'aux_r20_w2a2_fmnist',
        'qat_r20_w4a4_fmnist', 'aux_r20_w4a4_fmnist',
    ):  # fmt: skip
        top1 = {
            row['step']: row['accuracy/top1']
            for row in rows(f'{name}.json')
            if 'accuracy/top1' in row
        }
        lines.append([f'`{name}`', *(f'{top1[e]:.2f}' for e in shown)])
    head = ['recipe', f'top-1 after epoch {shown[0]}', *map(str, shown[1:])]
    return table(head, lines)


# --- results.md --------------------------------------------------------------


def by_network(name: str) -> dict[str, dict[int, float]]:
    """Network -> seed -> top-1, of a file that the quick start wrote."""
    return {
        row['network']: dict(zip(row['seeds'], row['top1'], strict=True))
        for row in rows(name)
    }


def budgets() -> str:
    """Plain training and the module, by start and number of epochs."""
    lines = []
    for start in ('float', 'scratch'):
        for count in (20, 8):
            found = by_network(f'digits_w2a2_{count}_epochs.jsonl')
            plain = found[f'plain from {start}']
            module = found[f'auxiliary from {start}']
            lines.append(
                [
                    f'from {start}, {count}',
                    spread(list(plain.values())),
                    spread(list(module.values())),
                    with_wins(paired(module, plain)),
                ]
            )
    head = ['start, epochs', 'plain W2A2', 'W2A2 with the module',
            'difference, wins']  # fmt: skip
    return table(head, lines)


def verdict(found: PairedDifference) -> str:
    """Whether the interval of a difference holds zero, in words."""
    words = {1: 'better', -1: 'worse', 0: 'no difference seen'}
    return words[side(found)]


def quick_start() -> str:
    """What the quick start prints."""
    sizes = {row['network']: row['bytes'] for row in rows('quickstart.jsonl')}
    lines, above = [], None
    for name, runs in by_network('quickstart.jsonl').items():
        beside = ''
        if above:
            found = paired(runs, above)
            beside = f'{without_wins(found)}: {verdict(found)}'
        lines.append(
            [name, spread(list(runs.values())), f'{sizes[name]:,}', beside]
        )
        above = runs
    head = ['network', 'top-1 (%)', 'bytes at its bits',
            'difference to the row above']  # fmt: skip
    return table(head, lines)


def digits_bytes() -> str:
    """Of the network for digits."""
    found = rows('digits_w2a2_20_epochs.jsonl')
    sizes = {row['network']: f'{row["bytes"]:,}' for row in found}
    ours = sizes['auxiliary from float']
    lines = [
        ['float', sizes['float']],
        ['F at its bits, with or without the module', ours],
    ]
    return table(['ResNet-20 for digits', 'bytes'], lines)


TABLES = {
    'bfloat16': bfloat16,
    'digits-rates': partial(
        arms, LOGS / 'digits_r8_rates', RATES, 'plain',
        ('arm', 'final top-1', BESIDE_PLAIN),
    ),
    'tiny-tuned': partial(
        tuned, LOGS / 'tiny_quarter_tuned', TECHNIQUES
    ),
    'tiny-full': partial(own_floats, LOGS / 'tiny_full'),
    'tiny-longer': partial(
        arms, LOGS / 'tiny_longer',
        {arm: GUIDANCE[arm] for arm in ('kd', 'on')}, 'on',
        ('guidance', 'final top-1', 'difference to float, trained on'),
    ),
    'tiny-rates': partial(tuned, LOGS / 'tiny_rates', TECHNIQUES),
    'tiny-teachers': partial(teachers, TEACHERS),
    'tiny-quarter-four-bits': partial(teachers, FOUR_BITS),
    'tiny-quarter-two-bits': partial(teachers, TWO_BITS),
    'digits-wide-teacher': partial(teachers, DIGITS_TEACHERS),
    'tiny-noskip': partial(own_floats, LOGS / 'tiny_noskip'),
    'tiny-w1a1-time': partial(
        equal_time, LOGS / 'tiny_w1a1_equal_time', 'kd'
    ),
    'tiny-half': partial(own_floats, LOGS / 'tiny_half'),
    'tiny-recipes': partial(own_floats, LOGS / 'tiny_recipes'),
    'tiny-r50': partial(own_floats, LOGS / 'tiny_r50_quarter'),
    'tiny-peers': partial(tuned, LOGS / 'tiny_peers', PEERS, BESIDE_OURS),
    'tiny-w1a1': partial(own_floats, LOGS / 'tiny_quarter_w1a1'),
    'tiny-w1a1-rates': partial(
        tuned, LOGS / 'tiny_quarter_w1a1', TECHNIQUES
    ),
    'digits-bits-and-decay': bits_and_decay,
    'digits-depthwise': partial(tuned, LOGS / 'digits_depthwise', TECHNIQUES),
    'digits-depthwise-seeds': partial(
        own_floats, LOGS / 'digits_depthwise_seeds'
    ),
    'digits-transformer': partial(
        tuned, LOGS / 'digits_transformer', WEIGHTS
    ),
    'digits-narrow': narrow_digits,
    'digits-narrow-seeds': partial(own_floats, LOGS / 'digits_narrow_seeds'),
    'digits-equal-time': partial(equal_time, LOGS / 'digits_equal_time'),
    'digits-module-seconds': partial(
        guided_seconds, 'aux', {
            'digits_equal_time': 'ResNet-8 (4-8-16), W2A2',
            'digits_w1a1_equal_time': 'ResNet-8 (8-16-32), W1A1',
        },
    ),
    'digits-teacher-rates': chosen_by_seeds,
    'digits-teacher-seconds': partial(
        guided_seconds, 'kd4', {
            'digits_teacher': 'ResNet-8 (8-16-32), W1A1',
        },
    ),
    'digits-teacher-time': partial(
        equal_time, LOGS / 'digits_teacher', 'kd4'
    ),
    'digits-w1a1-equal-time': partial(
        equal_time, LOGS / 'digits_w1a1_equal_time'
    ),
    'digits-narrow-w1a2': partial(own_floats, LOGS / 'digits_narrow_w1a2'),
    'digits-narrow-w1a2-rates': narrow_rates,
    'digits-peers': peers,
    'digits-w1a1': partial(own_floats, LOGS / 'digits_w1a1'),
    'digits-w1a1-seeds': partial(own_floats, LOGS / 'digits_w1a1_seeds'),
    'digits-ten-seeds': partial(
        arms, LOGS / 'digits_r8', QUICK, 'plain',
        ('arm', 'final top-1, ten seeds', BESIDE_PLAIN),
    ),
    'step-rates': step_rates,
    'bits-trained-on': partial(
        arms, LOGS / 'map/fmnist_narrow_bits', BITS, 'floatcont',
        ('network', 'top-1', 'difference to float'), False,
    ),
    'own-batch-norms': own_batch_norms,
    'fmnist-narrow': partial(
        arms, LOGS / 'fmnist_narrow_w2a2', NARROW, 'plain',
        ('guidance', 'final top-1', 'difference to plain, wins'),
    ),
    'digits-strategies': partial(
        arms, LOGS / 'digits_w2a2_strategies', STRATEGIES, 'plain',
        ('guidance', 'final top-1', 'difference to plain, wins'),
    ),
    'fmnist-epochs': epochs,
    'quick-start': quick_start,
    'digits-budgets': budgets,
    'digits-bytes': digits_bytes,
}  # fmt: skip
