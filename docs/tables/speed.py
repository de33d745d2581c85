"""Tables of speed.md: rows that ``python -m benchmarks`` wrote on GPUs."""

from functools import partial
from statistics import median

from mmauxq.text import table

from . import operations
from .records import STEPS, number, ratio, rows, with_range

RUNNER = 'default_step_h200.jsonl'
DEFAULT_FORMS = 'default_forms_h200.jsonl'
PRODUCT_NORM = 'product_norm_h200.jsonl'
FASTER_FORMS = 'faster_forms_h200.jsonl'
EPOCHS = 'epoch_cpu.jsonl'
FORMS = {
    'before': "torch's forms",
    'pooling': 'max pooling that keeps a byte for each maximum',
    'pooling and blocks': 'the same, and space-to-depth',
}
"""``kernels`` of a row of FASTER_FORMS -> what it is."""
PEER = 'mmpretrain/plain'
NETWORKS = {
    'r18': 'ResNet-18',
    'r20': 'ResNet-20',
    'r34': 'ResNet-34',
    'r50': 'ResNet-50',
    'mbv2': 'MobileNetV2',
    'deits': 'DeiT-S',
}
"""Name of the benchmark -> what it is."""
ARMS = {
    PEER: "MMPretrain's, float",
    'float/plain': 'at 32 bits',
    'float/compiled-fused': 'at 32 bits, `--compile`, fused optimizer',
    'w4a4/plain': 'W4A4',
    'w4a4/graphed': 'W4A4, `--cuda-graph`',
    'aux/plain': 'W4A4 with the module',
    'aux/eager': 'W4A4 with the module, `--eager`',
}
"""WHAT/FORM of an iteration of the runner -> what it is."""
OWN = {'r18': 32, 'r20': 128}
"""Network -> images in a batch, of those with tables of their own."""
AIMS = {'w4a4/plain': 0.45, 'aux/plain': 0.55}
"""WHAT/FORM -> the most that it may take, of the float iteration."""


# --- an iteration of tools/train.py ------------------------------------------


def runner(network: str, batch: int) -> dict[str, dict[str, dict]]:
    """Host -> WHAT/FORM -> the last row of it, of one network."""
    hosts: dict[str, dict[str, dict]] = {}
    for row in rows(RUNNER):
        of = row['arm'].startswith(f'runner/{network}/')
        if of and row['batch'] == batch:
            arms = hosts.setdefault(row.get('host', 'not named'), {})
            arms[f'{row["what"]}/{row["form"]}'] = row
    return hosts


def in_order(hosts: dict[str, dict[str, dict]]) -> list[str]:
    """All WHAT/FORM, the known ones first."""
    found = dict.fromkeys(arm for arms in hosts.values() for arm in arms)
    known = list(ARMS)
    return sorted(
        found, key=lambda arm: known.index(arm) if arm in known else len(known)
    )


def name_of(arm: str) -> str:
    """What WHAT/FORM is, for people."""
    return ARMS.get(arm, f'`{arm}`')


def card(network: str) -> str:
    """Each recipe, as a part of the float iteration on the same host."""
    hosts = runner(network, OWN[network])
    hosts = {host: arms for host, arms in hosts.items() if PEER in arms}
    recipes = [arm for arm in in_order(hosts) if arm.endswith('/plain')]
    recipes = [arm for arm in recipes if arm != PEER]
    parts = {
        host: [
            arms[arm]['ms'] / arms[PEER]['ms'] if arm in arms else None
            for arm in recipes
        ]
        for host, arms in hosts.items()
    }
    lines = [[host, *(ratio(x, 1) for x in xs)] for host, xs in parts.items()]
    if network == 'r18':
        aims = [AIMS.get(arm) for arm in recipes]
        lines.append(['aim', *(ratio(aim, 1) for aim in aims)])
        met = ['hosts that meet the aim']
        for aim, column in zip(aims, zip(*parts.values(), strict=True),
                               strict=True):  # fmt: skip
            known = [x for x in column if x is not None]
            good = sum(aim is not None and x <= aim for x in known)
            met.append(f'{good} of {len(known)}' if aim else '')
        lines.append(met)
    return table(['host', *map(name_of, recipes)], lines)


def iterations(network: str) -> str:
    """Milliseconds of an iteration by host."""
    hosts = runner(network, OWN[network])
    arms = in_order(hosts)
    lines = [
        [
            host,
            str(max(row['repeats'] for row in found.values())),
            *(with_range(found.get(arm)) for arm in arms),
        ]
        for host, found in hosts.items()
    ]
    return table(['host', 'iterations', *map(name_of, arms)], lines)


def other_iterations() -> str:
    """Those of all networks and batches without a table of their own."""
    names = dict.fromkeys(
        (row['network'], row['batch'])
        for row in rows(RUNNER)
        if row['arm'].startswith('runner/')
        and OWN.get(row['network']) != row['batch']
    )
    lines = []
    for name, batch in names:
        hosts = runner(name, batch)
        what = f'{NETWORKS.get(name, name)}, batches of {batch}'
        for arm in in_order(hosts):
            lines += [
                [what, name_of(arm), host, with_range(found[arm])]
                for host, found in hosts.items()
                if arm in found
            ]
    return table(['network', '', 'host', 'ms'], lines)


# --- a training step ---------------------------------------------------------


def steps(network: str, batch: int) -> dict[str, dict]:
    """WHAT/FORM -> the fastest of its rows."""
    best: dict[str, dict] = {}
    for row in rows(STEPS) + rows(RUNNER) + rows(DEFAULT_FORMS):
        if row['arm'].startswith(f'step/{network}/'):
            name = f'{row["what"]}/{row["form"]}'
            if row['batch'] == batch and (
                name not in best or row['ms'] < best[name]['ms']
            ):
                best[name] = row
    return best


STEPS_OF_R50 = {
    'float/compiled': 'float, compiled',
    'float/eager': 'float, eager',
    'w4a4/graphed': '**W4A4, `--cuda-graph`**',
    'float/graphed': 'the recipe at 32 bits, `--cuda-graph`',
    'w4a4/compiled': 'W4A4, `--compile`',
    'w4a4/eager': 'W4A4, eager',
    'w4a4/graphed-codes': "**W4A4, `--cuda-graph`, `memory='codes'`**",
    'w4a4/graphed-recompute': "**W4A4, `--cuda-graph`, `memory='recompute'`**",
    'w4a4/chained': 'W4A4, its merged operations launched one by one',
    'w4a4/codes': "W4A4, eager, `memory='codes'`",
    'w4a4/recompute': "W4A4, eager, `memory='recompute'`",
    'aux-quarter/graphed': '**+ module of quarter width, `--cuda-graph`**',
    'aux-quarter/graphed-codes': "the same, `memory='codes'`",
    'aux-quarter/compiled': 'the same, `--compile`',
    'aux/graphed': '**+ auxiliary module, `--cuda-graph`**',
    'aux/graphed-codes': "the same, `memory='codes'`",
    'aux/graphed-recompute': "the same, `memory='recompute'`",
    'kd/graphed': '+ distillation from ResNet-50, `--cuda-graph`',
    'kd/compiled': 'the same, `--compile`',
}
"""WHAT/FORM -> what it is; those without a row are left out."""
STEP_NAMES = {
    'w4a4': 'W4A4',
    'float': 'the recipe at 32 bits',
    'aux-quarter': 'W4A4 with the module of quarter width',
    'aux': 'W4A4 with the module',
}
"""WHAT of a step -> what it is."""
OTHER_STEPS = {
    ('r50', 32): {
        'float/graph': 'float, CUDA graph of the whole step',
        'w4a4/graphed': 'W4A4, `--cuda-graph`',
    },
    ('r18', 256): {
        'float/compiled': 'float, compiled',
        'w4a4/graphed': 'W4A4, `--cuda-graph`',
    },
    ('mbv2', 256): {
        'float/compiled': 'float, compiled',
        'float/graphed': 'the recipe at 32 bits, `--cuda-graph`',
        'w4a4/auto': 'W4A4, by default',
    },
    ('deits', 256): {
        'float/compiled': 'float, compiled',
        'float/eager': 'float, eager',
        'w4a4/auto': 'W4A4, by default',
    },
}
"""Network and batch -> WHAT/FORM -> what it is; ratios are to the first."""


def steps_of_r50() -> str:
    """ResNet-50 with batches of 256."""
    found = steps('r50', 256)
    compiled, eager = found['float/compiled'], found['float/eager']
    lines = [
        [
            name,
            number(found[arm]['ms']),
            ratio(found[arm]['ms'], compiled['ms']),
            ratio(found[arm]['ms'], eager['ms']),
            number(found[arm]['peak_gib']),
            ratio(found[arm]['peak_gib'], eager['peak_gib']),
        ]
        for arm, name in STEPS_OF_R50.items()
        if arm in found
    ]
    head = ['', 'ms', 'of float compiled', 'of float eager', 'peak GiB',
            'of float eager']  # fmt: skip
    return table(head, lines)


def other_steps() -> str:
    """Other batches and networks."""
    lines = []
    for (network, batch), arms in OTHER_STEPS.items():
        found = steps(network, batch)
        base = found[next(iter(arms))]['ms']
        lines += [
            [
                f'{NETWORKS[network]}, batches of {batch}',
                name,
                number(found[arm]['ms']),
                ratio(found[arm]['ms'], base),
                number(found[arm].get('peak_gib')),
            ]
            for arm, name in arms.items()
            if arm in found
        ]
    return table(['network', '', 'ms', 'of float', 'peak GiB'], lines)


def beside_float() -> dict[str, tuple[dict, dict]]:
    """Step by default -> compiled float and itself, in the last run that has
    both."""
    found = {(row['run'], row['arm']): row for row in rows(DEFAULT_FORMS)}
    pairs = {}
    for (run, arm), row in found.items():
        base = found.get((run, f'step/{row["network"]}/float/compiled/256'))
        if row['form'] == 'auto' and base:
            pairs[arm] = base, row
    return pairs


def default_forms() -> str:
    """Steps by default beside compiled float, in the last run of each."""
    lines = [
        [
            f'{NETWORKS[row["network"]]}, {STEP_NAMES[row["what"]]}',
            row['run'], with_range(base), with_range(row),
            ratio(row['ms'], base['low']),
        ]
        for base, row in beside_float().values()
    ]  # fmt: skip
    return table(
        ['batches of 256', 'run', 'float, compiled, ms', 'by default, ms',
         'of the 10th percentile of float'], lines,
    )  # fmt: skip


def product_norms() -> str:
    """Steps with batch norms as passes of their own and behind products."""
    found = {(row['kernels'], row['arm']): row for row in rows(PRODUCT_NORM)}
    lines = []
    for (kernels, arm), before in found.items():
        if kernels == 'before':
            after = found['product', arm]
            lines.append([
                f'{NETWORKS[before["network"]]}, {STEP_NAMES[before["what"]]}',
                with_range(before), with_range(after),
                ratio(after['ms'], before['ms']),
                number(before['peak_gib']), number(after['peak_gib']),
            ])  # fmt: skip
    return table(
        ['batches of 256', 'as passes of their own, ms', 'by algebra, ms',
         'of that', 'GiB', 'by algebra, GiB'], lines,
    )  # fmt: skip


def faster_forms() -> str:
    """Steps with torch's max pooling and first convolution, and without."""
    found = {(row['arm'], row['kernels']): row for row in rows(FASTER_FORMS)}
    lines = []
    for (arm, kernels), row in found.items():
        before = found[arm, 'before']
        lines.append(
            [f'{NETWORKS[row["network"]]}, W4A4', FORMS[kernels],
             with_range(row), ratio(row['ms'], before['ms']),
             number(row['peak_gib'])]
        )  # fmt: skip
    lines.sort(key=lambda line: line[0])
    return table(['batches of 256', '', 'ms', 'of before', 'GiB'], lines)


def spread_of_runs() -> str:
    """How much runs of one step differ."""
    lines = []
    for what, name in ('float/compiled', 'float, compiled'), (
        'float/eager', 'float, eager',
    ):  # fmt: skip
        times = [
            row['ms'] for row in rows(STEPS)
            if row['arm'] == f'step/r50/{what}/256'
        ]  # fmt: skip
        lines.append(
            [name, len(times), number(min(times)), number(max(times))]
        )
    return table(['', 'runs', 'smallest ms', 'largest ms'], lines)


def cost_of(what: str) -> str:
    """A step with guidance, of the plain one of the same kernels."""
    found = steps('r50', 256)
    return ratio(found[f'{what}/graphed']['ms'], found['w4a4/graphed']['ms'])


def guidance_cost() -> str:
    """A step with each guidance, beside the plain one."""
    lines = [
        [name, cost_of(what)]
        for what, name in (
            ('aux-quarter', 'module of quarter width'),
            ('kd', "teacher of F's size"),
            ('aux', 'full module'),
        )
    ]
    return table(['guidance', 'a step, of the plain one'], lines)


def targets() -> str:
    """What was aimed at, and what is reached."""
    ours = operations.kernel()
    r50, small = steps('r50', 256), steps('r50', 32)
    mobile = steps('mbv2', 256)
    compiled, eager = r50['float/compiled'], r50['float/eager']
    iteration = runner('r50', 256)['sixth']
    epochs = [row['ratio'] for row in rows(EPOCHS)]
    float_one, transformer = beside_float()['step/deits/w4a4/auto/256']
    deits = runner('deits', 256)['ninth']['w4a4/plain']
    r20 = runner('r20', 128)['ninth']['w4a4/plain']
    r20_step = next(
        row for row in rows(RUNNER)
        if (row['arm'], row['host']) == ('step/r20/w4a4/auto/128', 'ninth')
    )  # fmt: skip

    def time(arm: str, base: dict = compiled) -> float:
        return r50[arm]['ms'] / base['ms']

    def memory(arm: str) -> float:
        return r50[arm]['peak_gib'] / eager['peak_gib']

    least = [
        ('activation quantizer, forward', 0.92, ours['forward_of_copy']),
        ('activation quantizer, backward', 0.9, ours['backward_of_copy']),
    ]
    most = [
        ('time of W4A4', 0.92, time('w4a4/graphed')),
        ('the same, of float eager', 0.8, time('w4a4/graphed', eager)),
        ('time with batches of 32, both CUDA graphs', 1.0,
         small['w4a4/graphed']['ms'] / small['float/graph']['ms']),
        ('time of MobileNetV2 W4A4', 1.1,
         mobile['w4a4/auto']['ms'] / mobile['float/compiled']['ms']),
        ('time with the module', 1.5, time('aux/graphed')),
        ('time with the module of quarter width', 1.1,
         time('aux-quarter/graphed')),
        ("the same, of the time with a teacher of F's size", 1.0,
         time('aux-quarter/graphed') / time('kd/graphed')),
        ("memory of the same, of that with a teacher of F's size", 1.0,
         memory('aux-quarter/graphed') / memory('kd/graphed')),
        ('an iteration of `tools/train.py`', 0.9,
         iteration['w4a4/plain']['ms']
         / iteration['float/compiled-fused']['ms']),
        ('time of DeiT-S W4A4', 1.2, transformer['ms'] / float_one['low']),
        ('what `tools/train.py` adds to a step of DeiT-S, ms', 3,
         deits['ms'] - transformer['ms']),
        ('the same of ResNet-20, ms', 1.5, r20['ms'] - r20_step['ms']),
        ('an iteration of ResNet-20 at its best, ms', 2, r20['ms']),
        ('processor time of an epoch on the CPU, of a plain PyTorch loop',
         1.15, median(epochs)),
        ("memory with `memory='codes'`", 0.7, memory('w4a4/graphed-codes')),
        ("memory with `memory='recompute'`", 0.35,
         memory('w4a4/graphed-recompute')),
        ("memory with the module and `memory='recompute'`", 1.05,
         memory('aux/graphed-recompute')),
        ('the same, at best', 0.65, memory('aux/graphed-recompute')),
    ]  # fmt: skip
    lines = [
        [what, f'at least {aim:.0%} of a copy', f'{found:.0%}',
         'yes' if found >= aim else 'no']
        for what, aim, found in least
    ]  # fmt: skip
    lines += [
        [what, f'at most {aim:.2f}', f'{found:.2f}',
         'yes' if found <= aim else 'no']
        for what, aim, found in most
    ]  # fmt: skip
    return table(['what', 'target', 'reached', 'met'], lines)


TABLES = {
    'recipes-of-float': partial(card, 'r18'),
    'recipes-ms': partial(iterations, 'r18'),
    'resnet20-of-float': partial(card, 'r20'),
    'resnet20-ms': partial(iterations, 'r20'),
    'other-iterations': other_iterations,
    'steps-resnet50': steps_of_r50,
    'steps-other': other_steps,
    'default-forms': default_forms,
    'product-norms': product_norms,
    'faster-forms': faster_forms,
    'steps-runs': spread_of_runs,
    'steps-guidance': guidance_cost,
    'targets': targets,
}
