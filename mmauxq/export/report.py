"""The report of an export, for people."""

from typing import Any


def _row(*cells: Any) -> str:
    return '| ' + ' | '.join(map(str, cells)) + ' |'


def _percent(value: float | None) -> str:
    return 'unknown' if value is None else f'{value:.2%}'


def _bits(value: int) -> str:
    return 'float' if value == 32 else str(value)


def as_markdown(report: dict[str, Any]) -> str:
    """``report.json`` as a page."""
    onnx, sizes = report['onnx'], report['sizes']
    agreement = report['agreement']['model.onnx']
    guidance = report['guidance']
    about = report['runtime']
    text = [
        '# Export report',
        '',
        f'MMAuxQ {report["mmauxq_version"]}, torch {about["torch"]}, onnx '
        f'{about["onnx"]}, onnxruntime {about["onnxruntime"]} '
        f'({", ".join(about["cpu"])}).',
        '',
        '## Agreement with the PyTorch network',
        '',
        _row('', 'model.onnx'),
        _row('---', '---'),
        _row(
            'images',
            f'{agreement["images"]} '
            + (
                'of the validation set'
                if report['real_images']
                else 'generated'
            ),
        ),
        _row('same class', _percent(agreement['top1_agreement'])),
        _row('top-1', _percent(agreement['top1'])),
        _row('top-1 of PyTorch', _percent(agreement['top1_torch'])),
        _row(
            'largest difference of logits',
            f'{agreement["max_difference"]:.2e} (largest logit '
            f'{agreement["largest_logit"]:.1f})',
        ),
        _row('integer codes compared', f'{agreement["codes"]:,}'),
        _row('of them different at a rounding tie', agreement['ties']),
        _row('different elsewhere', agreement['unexplained']),
        _row('images with a tie', agreement['images_touched']),
        '',
        '`packed.safetensors` and `slim.pth` give the logits of the PyTorch '
        'network to the bit.',
        '',
    ]
    if 'batch_norm' in report:
        norm = report['batch_norm']
        text += [
            f'Batch norms re-estimated from {norm["batches"]} batches: top-1 '
            f'{_percent(norm["top1_before"])} before, '
            f'{_percent(norm["top1_after"])} after.',
            '',
        ]
    text += [
        '## Bytes',
        '',
        _row('', 'bytes'),
        _row('---', '---:'),
        _row('float network', f'{sizes["float"]:,}'),
        _row('sum of bits', f'{sizes["sum_of_bits"]:,}'),
        *(
            _row(f'`{name}`', f'{sizes[name]:,}')
            for name in ('packed.safetensors', 'model.onnx', 'slim.pth')
        ),
        '',
        '## model.onnx',
        '',
        f'Opset {onnx["opset"]}, weights as '
        f'{", ".join(sorted(set(onnx["containers"].values())))} '
        f'(`{onnx["weights"]}`), residual sums `{onnx["residual"]}`. '
        f'{onnx["batch_norms_folded"]} batch norms folded, '
        f'{len(onnx["batch_norms_kept"])} kept'
        + (
            ': a negative slope would need a code that the type does not hold.'
            if onnx['batch_norms_kept']
            else '.'
        ),
        '',
        'Operators that the runtime runs: '
        + ', '.join(f'{n} {k}' for k, n in sorted(onnx['operators'].items()))
        + '.',
        '',
    ]
    if onnx['weights'] == 'typed':
        text += [
            'This form is small; the runtime computes it in float. '
            '`--weights int8` is the form for integer kernels.',
            '',
        ]
    elif onnx['float_outputs']:
        text += [
            f'{len(onnx["float_outputs"])} quantized layers write a float '
            'result (a residual sum, or the end of the network) and run in '
            'float: ' + ', '.join(onnx['float_outputs']) + '. '
            '`--residual int8` quantizes those sums.',
            '',
        ]
    text += [f'Note: {note}\n' for note in onnx['notes']]
    text += [
        '## Cost',
        '',
        f'{report["parameters"]:,} parameters, {report["multiply_adds"]:,} '
        f'multiply-adds, {report["bit_operations"]:,} bit-operations for one '
        'image.',
        '',
    ]
    if guidance['type']:
        text += [
            f'In training, {guidance["type"]} cost '
            f'{guidance["parameters"]:,} more parameters and '
            f'{guidance["multiply_adds"]:,} more multiply-adds for each '
            f'forward pass; {report["guidance_left"]} of its tensors are '
            'left.',
            '',
        ]
    text += [
        _row('layer', 'W', 'A', 'weight range', 'levels', 'input range',
             'levels', 'multiply-adds', 'bit-operations'),
        _row('---', *['---:'] * 8),
    ]  # fmt: skip
    for layer in report['layers']:
        cells = []
        for role in ('weight', 'input'):
            span = layer.get(f'{role}_range')
            cells.append(
                '' if span is None else f'{span[0]:.3g}..{span[1]:.3g}'
            )
            cells.append(layer.get(f'{role}_levels') or '')
        text.append(
            _row(
                layer['name'],
                _bits(layer['weight_bits']),
                _bits(layer['activation_bits']),
                *cells,
                f'{layer["multiply_adds"]:,}',
                f'{layer["bit_operations"]:,}',
            )
        )
    return '\n'.join(text) + '\n'
