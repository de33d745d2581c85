"""Tables of speed.md and experiments.md: operations, what can be merged."""

from mmauxq.text import table

from .records import STEPS, number, rows

LARGE = ([256, 256, 56, 56], 'bfloat16', 'channels last')
OPERATIONS = {
    'copy': 'copy',
    'mmauxq': 'kernel',
    'mmauxq, compiled': 'reference, compiled',
    'torch, fixed step': 'torch, fake quantization',
    'torch, learned step': 'torch, learnable fake quantization',
    'mmrazor': 'mmrazor',
    'mmauxq, reference': 'reference, eager',
    'brevitas': 'brevitas 0.13',
}
"""Name in the records -> what it is."""


def percent(value: float | None) -> str:
    """A whole number of percent; nothing for nothing."""
    return '' if value is None else f'{value:.0%}'


def operations() -> list[dict]:
    """The rows of activation quantizers."""
    return [row for row in rows(STEPS) if row['arm'] == 'ops/activations']


def is_large(row: dict) -> bool:
    """Whether it is of the tensor that is the measure."""
    return (row['shape'], row['dtype'], row['layout']) == LARGE


def kernel() -> dict:
    """The row of the kernel on that tensor."""
    found = (row for row in operations() if is_large(row))
    return next(row for row in found if row['name'] == 'mmauxq')


def activations() -> str:
    """The activation quantizer on one large tensor."""
    found = {row['name']: row for row in operations() if is_large(row)}
    lines = []
    for name, shown in OPERATIONS.items():
        row = found[name]
        copy = name == 'copy'
        if copy:
            shown += f' ({number(row["gb_per_s"])} GB/s)'
        learned = {True: 'yes', False: 'no'}.get(row.get('learned'), '')
        lines.append(
            [shown, learned, number(row['forward_ms']),
             '100%' if copy else percent(row['forward_of_copy']),
             number(row.get('backward_ms')),
             percent(row.get('backward_of_copy'))]
        )  # fmt: skip
    head = ['', 'learned step', 'forward ms', "of a copy's bandwidth",
            'backward ms', "of a copy's bandwidth"]  # fmt: skip
    return table(head, lines)


def other_tensors() -> str:
    """The kernel on other tensors."""
    lines = [
        [
            f'({", ".join(map(str, row["shape"]))})',
            f'{row["dtype"]}, {row["layout"]}',
            number(row['forward_ms']),
            percent(row['forward_of_copy']),
            percent(row['backward_of_copy']),
        ]
        for row in operations()
        if row['name'] == 'mmauxq' and not is_large(row)
    ]
    head = ['tensor', '', 'forward ms', "forward, of a copy's bandwidth",
            'backward']  # fmt: skip
    return table(head, lines)


def chains() -> str:
    """Networks whose batch norms can be merged."""
    found = rows('chains_cpu.jsonl')
    merged = [
        sum(n for kind, n in row['kinds'].items() if kind != 'alone')
        for row in found
    ]
    worst = max(row['error'] for row in found)
    lines = [
        ['types of backbone', len(found)],
        ['of them with chains that can be merged', sum(map(bool, merged))],
        ['chains in all', f'{sum(merged):,}'],
        ['types whose losses, gradients and buffers equal those without '
         'merging, to the bit', sum(row['equal'] for row in found)],
        ['largest difference in the other one, MobileOne',
         f'{worst:.1%} of the gradient of a step'],
    ]  # fmt: skip
    return table(['', ''], lines)


FUSIONS = 'fusions_h200.jsonl'
FUSED = {
    'forward/statistics': 'forward: sums of batch norm in the product',
    'forward/codes': 'the same, reading codes',
    'backward/behind': 'backward: the first pass of the batch norm before it '
    'in the input gradient',
    'backward/kept': 'the same, and the second pass of the one behind it, '
    'written out once',
    'backward/codes': 'backward: the weight gradient reads codes',
    'backward/codes, both': 'all of these, nothing written out',
}
"""Form in the records -> what it is."""
PARTS = {
    'convolution': 'convolution, cuDNN',
    'statistics': 'sums of batch norm, a kernel of their own',
    'product, values': 'both in one Triton kernel',
    'input gradient': 'input gradient, cuDNN',
    'first pass': 'first pass of the batch norm before it',
    'input, behind': 'both in one Triton kernel',
}
"""Part in the records -> what it is."""


def fusions() -> str:
    """Fused 1x1 convolutions of ResNet-50, beside what runs today."""
    (summary,) = (r for r in rows(FUSIONS) if r['arm'] == 'summary')
    lines = []
    for form, shown in FUSED.items():
        today = summary[f'{form.partition("/")[0]}/today']
        saved = summary[f'{form} saves']
        lines.append(
            [
                shown,
                number(today),
                number(today - saved['all']),
                number(today - saved['best']),
            ]
        )
    head = ['what is fused', 'today, ms', 'fused everywhere, ms',
            'fused where it is faster, ms']  # fmt: skip
    return table(head, lines)


def fusion_parts() -> str:
    """The kernels of it, over all layers and of the largest output."""
    found = [row for row in rows(FUSIONS) if 'parts' in row]
    (one,) = (row for row in found if row['arm'] == 'layer1.*.conv3')
    lines = [
        [
            shown,
            number(sum(r['count'] * r['parts'][part]['ms'] for r in found)),
            number(one['parts'][part]['ms']),
            f'{one["parts"][part]["gb_per_s"]:,.0f}',
        ]
        for part, shown in PARTS.items()
    ]
    head = ['kernel', 'all layers, ms', 'of 64 to 256 channels, ms', 'GB/s']
    return table(head, lines)


NORM_SUMS = 'norm_sums_h200.jsonl'


def norm_sums() -> str:
    """Batch norm, ReLU and quantizer, before and after its sums changed."""
    lines = [
        [' x '.join(map(str, row['shape'])), number(row['before_us']),
         number(row['after_us'])]
        for row in rows(NORM_SUMS)
    ]  # fmt: skip
    return table(['feature map', 'before, us', 'after, us'], lines)


TABLES = {
    'activations': activations,
    'activations-other': other_tensors,
    'chains': chains,
    'fusions': fusions,
    'fusion-parts': fusion_parts,
    'norm-sums': norm_sums,
}
