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
    text = ['# Export report', '', _about(report), '']
    text += _agreement(report)
    text += _sizes(report)
    text += _onnx(report)
    text += _cost(report)
    return '\n'.join(text) + '\n'


def _about(report: dict[str, Any]) -> str:
    about = report['runtime']
    return (
        f'MMAuxQ {report["mmauxq_version"]}, torch {about["torch"]}, onnx '
        f'{about["onnx"]}, onnxruntime {about["onnxruntime"]}; '
        f'{about["cpu"]} ({", ".join(about["cpu_features"])}).'
    )


def _agreement(report: dict[str, Any]) -> list[str]:
    agreement = report['agreement']['model.onnx']
    same = report['agreement']['slim.pth']
    images = 'of the validation set' if report['real_images'] else 'generated'
    text = [
        '## Agreement with the PyTorch network',
        '',
        f'On {agreement["images"]} images, {images}. `slim.pth` and '
        '`packed.safetensors` were loaded again and give the logits of the '
        f'PyTorch network to the bit, on {same["bit_equal_on"]} of them. '
        '`model.onnx` ran in ONNX Runtime on all:',
        '',
        _row('', 'PyTorch, slim.pth, packed.safetensors', 'model.onnx'),
        _row('---', '---:', '---:'),
        _row(
            'top-1',
            _percent(agreement['top1_torch']),
            _percent(agreement['top1']),
        ),
        _row('same class', agreement['images'], agreement['same_class']),
        _row(
            'largest difference of logits',
            0,
            f'{agreement["max_difference"]:.1e} (largest logit '
            f'{agreement["largest_logit"]:.1f})',
        ),
    ]
    if report['onnx']['residual'] == 'float':
        text += [
            _row('weight codes that differ', 0, 0),
            _row('activation codes compared', '', f'{agreement["codes"]:,}'),
            _row('differ at a rounding tie', 0, agreement['ties']),
            _row('differ by a rounded bias', 0, agreement['rounded']),
            _row('differ otherwise', 0, agreement['unexplained']),
            _row('images in which one differs', 0,
                 agreement['images_touched']),
            '',
            'Each layer is compared from the same codes before it.',
        ]  # fmt: skip
    else:
        text += ['', 'Residual sums in 8 bits are another network than the '
                 'one that was trained: its codes are not compared, its '
                 'accuracy is measured.']  # fmt: skip
    if 'batch_norm' in report:
        norm = report['batch_norm']
        text += [
            '',
            f'Batch norms were re-estimated from {norm["batches"]} batches: '
            f'top-1 {_percent(norm["top1_before"])} before, '
            f'{_percent(norm["top1_after"])} after.',
        ]
    return [*text, '']


def _sizes(report: dict[str, Any]) -> list[str]:
    sizes = report['sizes']
    rows = [
        ('float network', 'float'),
        ('network at the bits of each weight', 'sum_of_bits'),
        *(
            (f'`{name}`', name)
            for name in ('packed.safetensors', 'model.onnx', 'slim.pth')
        ),
    ]
    return [
        '## Bytes',
        '',
        _row('', 'bytes'),
        _row('---', '---:'),
        *(_row(text, f'{sizes[name]:,}') for text, name in rows),
        '',
    ]


def _onnx(report: dict[str, Any]) -> list[str]:
    onnx = report['onnx']
    kinds = ', '.join(sorted(set(onnx['containers'].values())))
    counts = sorted(onnx['operators'].items())
    text = [
        '## model.onnx',
        '',
        f'Opset {onnx["opset"]}, weights as {kinds} (`--weights '
        f'{onnx["weights"]}`), residual sums `{onnx["residual"]}`. '
        f'{onnx["batch_norms_folded"]} batch norms folded, '
        f'{len(onnx["batch_norms_kept"])} kept'
        + (
            ': a negative slope would need a code that the type does not hold.'
            if onnx['batch_norms_kept']
            else '.'
        ),
        '',
        'Operators that the runtime runs: '
        + ', '.join(f'{n} {k}' for k, n in counts)
        + '.',
        '',
    ]
    if onnx['weights'] == 'typed':
        text += [
            'This form is small; the runtime computes it in float. '
            '`--weights int8` is the form for integer kernels.',
            '',
        ]
    else:
        text += [_kernels(onnx), '']
    return text + [f'Note: {note}\n' for note in onnx['notes']]


def _kernels(onnx: dict[str, Any]) -> str:
    text = (
        f'{len(onnx["integer_layers"])} of {len(onnx["containers"])} '
        f'quantized layers run in integer kernels. {onnx["exact_channels"]} '
        'output channels have a whole bias that changes no code.'
    )
    for layer, channels in onnx['rounded_channels'].items():
        text += f'\n* `{layer}`: the bias of {channels} channels is rounded.'
    for layer, reason in onnx['float_layers'].items():
        text += f'\n* `{layer}` runs in float: {reason}.'
    return text


def _cost(report: dict[str, Any]) -> list[str]:
    guidance = report['guidance']
    text: list[str] = []
    text += [
        '## Cost',
        '',
        f'{report["parameters"]:,} parameters, {report["multiply_adds"]:,} '
        f'multiply-adds, {report["bit_operations"]:,} bit-operations for one '
        f'image of (C, H, W) = {tuple(report["image_shape"])}.',
        '',
    ]
    if guidance['type']:
        cost = 'an unknown number of parameters and multiply-adds'
        if guidance['parameters'] is not None:
            cost = (
                f'{guidance["parameters"]:,} more parameters and '
                f'{guidance["multiply_adds"]:,} more multiply-adds'
            )
        text += [
            f'In training, {guidance["type"]} cost {cost} for each forward '
            f'pass; {report["guidance_left"]} of its tensors are left.',
            '',
        ]
    text += [
        _row('layer', 'W', 'A', 'weight range', 'levels', 'input range',
             'levels', 'multiply-adds', 'bit-operations', 'runs as'),
        _row('---', *['---:'] * 8, '---'),
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
                layer['operator'],
            )
        )
    return text
