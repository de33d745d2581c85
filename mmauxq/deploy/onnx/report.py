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

MMAuxQ {mmauxq_version}, torch {runtime[torch]}, {versions}; {runtime[cpu]} \
({features}).

## Agreement with the PyTorch network

On {images} images, {origin}. `slim.pth` and `packed.safetensors` were loaded \
again and ran on all of them: they give the logits of the PyTorch network to \
the bit. `{model}` ran in {engine} on all of them, too:

{agreement}
{compared}

## Bytes

{bytes}
## {model}

{form}

## Cost

{parameters:,} parameters, {multiply_adds:,} multiply-adds, \
{bit_operations:,} bit-operations for one image of (C, H, W) = {shape}.\
{training}

{layers}"""
FORM = """\
Opset {opset} ({opset_reason}), weights as {types} (`{option}`), residual \
sums `{residual}`. {batch_norms_folded} batch norms folded, {kept}.

Operators that {runs}: {operators}.

{kernels}{notes}"""
LAYERS = 'Each layer is compared from the same codes before it.'
RESIDUAL = (
    'Residual sums in 8 bits are another network than the one that was '
    'trained: its codes are not compared, its accuracy is measured.'
)
HEAD = (
    'layer', 'W', 'A', 'weight range', 'levels', 'input range', 'levels',
    'multiply-adds', 'bit-operations', 'runs as',
)  # fmt: skip
CODES = {
    'activation codes compared': '{codes:,}',
    'differ at a rounding tie': '{ties}',
    'differ by a rounded bias': '{rounded}',
    'differ otherwise': '{unexplained}',
    'images in which one differs': '{images_touched}',
}
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


def as_page(
    report: dict[str, Any],
    model: str,
    codes: dict[str, str],
    norms: dict[str, str] | None = None,
    **words: str,
) -> str:
    """``report.json`` as a page.

    Args:
        report: Of an export.
        model: The file of its form.
        codes: Name -> what was counted of codes, in the table of agreement.
        norms: Rows of that table for batch norms.
        words: What else :data:`PAGE` holds of the form.
    """
    seen, sizes = report['agreement'][model], report['sizes']
    rows = {'top-1 of PyTorch': percent(seen['top1_torch'])}
    for name, one in report['agreement'].items():
        rows[f'top-1 of `{name}`'] = percent(one['top1'])
    rows |= norms or {}
    rows['images with the same class'] = seen['same_class']
    rows['largest difference of logits'] = (
        f'{seen["max_difference"]:.1e} '
        f'(largest logit {seen["largest_logit"]:.1f})'
    )
    rows |= {name: text.format(**seen) for name, text in codes.items()}
    names = ('packed.safetensors', model, 'slim.pth')
    size_rows = {
        'float network': sizes['float'],
        'network at the bits of each weight': sizes['sum_of_bits'],
        **{f'`{name}`': sizes[name] for name in names},
    }
    shown = ((name, f'{size:,}') for name, size in size_rows.items())
    words |= dict(
        model=model,
        features=', '.join(report['runtime']['cpu_features']),
        images=str(seen['images']),
        origin=('generated', 'of the validation set')[report['real_images']],
        agreement=table(('', 'measured'), rows.items(), 'lr'),
        bytes=table(('', 'bytes'), shown, 'lr'),
        shape=str(tuple(report['image_shape'])),
        training=training_cost(report['guidance']),
        layers=table(HEAD, map(layer_row, report['layers']), 'lrrrrrrrrl'),
    )
    return PAGE.format(**report | words)


def in_form(form: dict[str, Any]) -> dict[str, str]:
    """Types of weights, and operators of a file, in words."""
    operators = sorted(form['operators'].items())
    return dict(
        types=', '.join(sorted(set(form['containers'].values()))),
        operators=', '.join(f'{count} {name}' for name, count in operators),
    )


def as_markdown(report: dict[str, Any]) -> str:
    """``report.json`` of an export to ONNX as a page."""
    onnx, runtime = report['onnx'], report['runtime']
    kept, is_qonnx = len(onnx['batch_norms_kept']), onnx['weights'] == 'qonnx'
    codes, compared = {}, RESIDUAL
    if onnx['residual'] == 'float':
        codes, compared = CODES, LAYERS
    if 'batch_norm' in report:
        norm = report['batch_norm']
        before, after = norm['top1_before'], norm['top1_after']
        numbers = norm['batches'], percent(before), percent(after)
        compared += NORMS.format(*numbers)
    versions = f'onnx {runtime["onnx"]}, onnxruntime {runtime["onnxruntime"]}'
    engine, runs = 'ONNX Runtime', 'the runtime runs'
    option = f'--weights {onnx["weights"]}'
    if is_qonnx:
        versions += f', qonnx {runtime["qonnx"]}'
        engine, runs = 'the executor of the package qonnx', 'the file has'
        option = '--format qonnx'
    words = in_form(onnx) | dict(
        kept=f'{kept} kept{KEPT if kept and not is_qonnx else ""}',
        kernels=FLOAT.get(onnx['weights']) or _kernels(onnx),
        notes=''.join(f'\n\nNote: {note}' for note in onnx['notes']),
        option=option,
        runs=runs,
    )
    return as_page(
        report,
        'model.onnx',
        codes,
        versions=versions,
        engine=engine,
        compared=compared,
        form=FORM.format(**onnx | words),
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
