"""The report of an export: the table of layers, and the page for people."""

from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from mmauxq.analysis import LevelCount, layer_costs
from mmauxq.network.profile import count_parameters
from mmauxq.quantizers import FLOAT_BITS, Quantizer, named_quantizers
from mmauxq.text import percent, table

PAGE = """\
# Export report

MMAuxQ {mmauxq_version}, torch {runtime[torch]}, onnx {runtime[onnx]}, \
onnxruntime {runtime[onnxruntime]}{qonnx}; {runtime[cpu]} ({features}).

## Agreement with the PyTorch network

On {agreement[model.onnx][images]} images, {origin}. `slim.pth` and \
`packed.safetensors` were loaded again and ran on all of them: they give the \
logits of the PyTorch network to the bit. `model.onnx` ran in {engine} on all \
of them, too:

|  | measured |
| --- | ---: |
| top-1 of PyTorch | {top1[torch]} |
| top-1 of `slim.pth` | {top1[slim.pth]} |
| top-1 of `packed.safetensors` | {top1[packed.safetensors]} |
| top-1 of `model.onnx` | {top1[model.onnx]} |
| images with the same class | {agreement[model.onnx][same_class]} |
| largest difference of logits \
| {agreement[model.onnx][max_difference]:.1e} \
(largest logit {agreement[model.onnx][largest_logit]:.1f}) |
{codes}{norms}

## Bytes

|  | bytes |
| --- | ---: |
| float network | {sizes[float]:,} |
| network at the bits of each weight | {sizes[sum_of_bits]:,} |
| `packed.safetensors` | {sizes[packed.safetensors]:,} |
| `model.onnx` | {sizes[model.onnx]:,} |
| `slim.pth` | {sizes[slim.pth]:,} |

## model.onnx

Opset {onnx[opset]} ({onnx[opset_reason]}), weights as {types} (`{option}`), \
residual sums `{onnx[residual]}`. {onnx[batch_norms_folded]} batch norms \
folded, {kept}.

Operators that {runs}: {operators}.

{kernels}{notes}

## Cost

{parameters:,} parameters, {multiply_adds:,} multiply-adds, \
{bit_operations:,} bit-operations for one image of (C, H, W) = {shape}.\
{training}

{table}"""
CODES = """\
| activation codes compared | {codes:,} |
| differ at a rounding tie | {ties} |
| differ by a rounded bias | {rounded} |
| differ otherwise | {unexplained} |
| images in which one differs | {images_touched} |

Each layer is compared from the same codes before it."""
RESIDUAL = """
Residual sums in 8 bits are another network than the one that was trained: \
its codes are not compared, its accuracy is measured."""
HEAD = (
    'layer', 'W', 'A', 'weight range', 'levels', 'input range', 'levels',
    'multiply-adds', 'bit-operations', 'runs as',
)  # fmt: skip
NORMS = (
    '\n\nBatch norms were re-estimated from {} batches: top-1 {} before, {} '
    'after.'
)
KEPT = ': a negative slope would need a code that the type does not hold'
SATURATES = (
    'two products of its codes may not fit 16 bits. x86 processors without '
    'VNNI add them there, and ONNX Runtime then gives other codes unless its '
    'session has `session.x64quantprecision` = `1`.'
)
FLOAT = dict(
    typed='This form is small; the runtime computes it in float. `--weights '
    'int8` is the form for integer kernels.',
    qonnx='Each quantizer is a `Quant` node of QONNX. Batch norms stand as '
    'they were trained.',
)


def layer_table(
    architecture: nn.Module,
    image: Tensor,
    audit: list[LevelCount],
    kernels: dict[str, str],
) -> dict[str, Any]:
    """Bits, range, levels and cost of each layer that runs on an image
    (1, C, H, W), and their sums; ``kernels``: layer -> integer operator."""
    levels = {count.name: count.levels for count in audit}
    quantizers = dict(named_quantizers(architecture))
    rows = []
    for cost in layer_costs(architecture, image):
        row = dict(
            **asdict(cost),
            bit_operations=cost.bit_operations,
            operator=kernels.get(cost.name, 'float'),
        )
        for role in ('weight', 'input'):
            name = f'{cost.name}.{role}_quantizer'
            if name in quantizers:
                row[f'{role}_range'] = _range(quantizers[name])
                row[f'{role}_levels'] = levels.get(name)
        rows.append(row)
    return dict(
        image_shape=list(image.shape[1:]),
        layers=rows,
        parameters=count_parameters(architecture)
        - sum(p.numel() for q in quantizers.values() for p in q.parameters()),
        multiply_adds=sum(row['multiply_adds'] for row in rows),
        bit_operations=sum(row['bit_operations'] for row in rows),
    )


def _range(quantizer: Quantizer) -> list[float]:
    """Lowest and highest value, over all channels."""
    grid = quantizer.grid()
    offset = 0.0 if grid.offset is None else grid.offset
    lowest = grid.qmin * grid.scale + offset
    highest = grid.qmax * grid.scale + offset
    return [float(lowest.min()), float(highest.max())]


def as_markdown(report: dict[str, Any]) -> str:
    """``report.json`` as a page."""
    onnx, agreement = report['onnx'], report['agreement']['model.onnx']
    kept = len(onnx['batch_norms_kept'])
    codes = CODES if onnx['residual'] == 'float' else RESIDUAL
    norms = ''
    if 'batch_norm' in report:
        norm = report['batch_norm']
        before, after = norm['top1_before'], norm['top1_after']
        norms = NORMS.format(norm['batches'], percent(before), percent(after))
    top1 = {name: one['top1'] for name, one in report['agreement'].items()}
    top1['torch'] = agreement['top1_torch']
    option, runs = f'--weights {onnx["weights"]}', 'the runtime runs'
    qonnx, engine = '', 'ONNX Runtime'
    if onnx['weights'] == 'qonnx':
        option, runs = '--format qonnx', 'the file has'
        qonnx = f', qonnx {report["runtime"]["qonnx"]}'
        engine = 'the executor of the package qonnx'
    origins = 'generated', 'of the validation set'
    operators = sorted(onnx['operators'].items())
    return PAGE.format(
        **report,
        features=', '.join(report['runtime']['cpu_features']),
        origin=origins[report['real_images']],
        top1={name: percent(value) for name, value in top1.items()},
        codes=codes.format(**agreement),
        norms=norms,
        types=', '.join(sorted(set(onnx['containers'].values()))),
        kept=f'{kept} kept{KEPT if kept and not qonnx else ""}',
        operators=', '.join(f'{count} {name}' for name, count in operators),
        kernels=FLOAT.get(onnx['weights']) or _kernels(onnx),
        option=option,
        runs=runs,
        qonnx=qonnx,
        engine=engine,
        notes=''.join(f'\n\nNote: {note}' for note in onnx['notes']),
        shape=tuple(report['image_shape']),
        training=training_cost(report['guidance']),
        table=table(HEAD, map(layer_row, report['layers']), 'lrrrrrrrrl'),
    )


def _kernels(onnx: dict[str, Any]) -> str:
    text = (
        f'{len(onnx["integer_layers"])} of {len(onnx["containers"])} '
        f'quantized layers run in integer kernels. {onnx["exact_channels"]} '
        'output channels have an integer bias that changes no code.'
    )
    for layer, channels in onnx['rounded_channels'].items():
        text += f'\n* `{layer}`: the bias of {channels} channels is rounded.'
    for layer in onnx['saturating_layers']:
        text += f'\n* `{layer}`: {SATURATES}'
    for layer, reason in onnx['float_layers'].items():
        text += f'\n* `{layer}` runs in float: {reason}.'
    return text


def training_cost(guidance: dict[str, Any]) -> str:
    """What the guidance cost in training, in words."""
    if not guidance['type']:
        return ''
    cost = 'an unknown number of parameters and multiply-adds'
    if guidance['parameters'] is not None:
        cost = (
            f'{guidance["parameters"]:,} more parameters and '
            f'{guidance["multiply_adds"]:,} more multiply-adds'
        )
    return (
        f'\n\nIn training, {guidance["type"]} cost {cost} for each forward '
        'pass; the files hold nothing of it.'
    )


def layer_row(layer: dict[str, Any]) -> list[Any]:
    """A layer under :data:`HEAD`."""
    row = [layer['name']]
    for kind in ('weight', 'activation'):
        bits = layer[f'{kind}_bits']
        row.append('float' if bits == FLOAT_BITS else bits)
    for role in ('weight', 'input'):
        low, high = layer.get(f'{role}_range', (None, None))
        row.append('' if low is None else f'{low:.3g}..{high:.3g}')
        row.append(layer.get(f'{role}_levels') or '')
    row += [f'{layer[key]:,}' for key in ('multiply_adds', 'bit_operations')]
    return [*row, layer['operator']]
