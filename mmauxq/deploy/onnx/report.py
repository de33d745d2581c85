"""The report of an export, for people."""

from typing import Any

from mmauxq.text import percent, table


def as_markdown(report: dict[str, Any]) -> str:
    """``report.json`` as a page."""
    parts = [
        _about(report),
        *_agreement(report),
        *_sizes(report['sizes']),
        *_onnx(report['onnx']),
        *_cost(report),
    ]
    return '\n\n'.join(part.rstrip() for part in parts) + '\n'


def _about(report: dict[str, Any]) -> str:
    about = report['runtime']
    return (
        f'# Export report\n\nMMAuxQ {report["mmauxq_version"]}, torch '
        f'{about["torch"]}, onnx {about["onnx"]}, onnxruntime '
        f'{about["onnxruntime"]}; {about["cpu"]} '
        f'({", ".join(about["cpu_features"])}).'
    )


def _agreement(report: dict[str, Any]) -> list[str]:
    agreement = report['agreement']['model.onnx']
    same = report['agreement']['slim.pth']
    images = 'of the validation set' if report['real_images'] else 'generated'
    rows = [
        ('top-1 of PyTorch', percent(agreement['top1_torch'])),
        ('top-1', percent(agreement['top1'])),
        ('images with the same class', agreement['same_class']),
        (
            'largest difference of logits',
            f'{agreement["max_difference"]:.1e} (largest logit '
            f'{agreement["largest_logit"]:.1f})',
        ),
    ]
    if report['onnx']['residual'] == 'float':
        rows += [
            ('activation codes compared', f'{agreement["codes"]:,}'),
            ('differ at a rounding tie', agreement['ties']),
            ('differ by a rounded bias', agreement['rounded']),
            ('differ otherwise', agreement['unexplained']),
            ('images in which one differs', agreement['images_touched']),
        ]
        codes = 'Each layer is compared from the same codes before it.'
    else:
        codes = (
            'Residual sums in 8 bits are another network than the one that '
            'was trained: its codes are not compared, its accuracy is '
            'measured.'
        )
    parts = [
        '## Agreement with the PyTorch network',
        f'On {agreement["images"]} images, {images}. `slim.pth` and '
        '`packed.safetensors` were loaded again and give the logits of the '
        f'PyTorch network to the bit, on {same["bit_equal_on"]} of them. '
        '`model.onnx` ran in ONNX Runtime on all:',
        table(['', 'model.onnx'], rows, 'lr'),
        codes,
    ]
    if 'batch_norm' in report:
        norm = report['batch_norm']
        parts.append(
            f'Batch norms were re-estimated from {norm["batches"]} batches: '
            f'top-1 {percent(norm["top1_before"])} before, '
            f'{percent(norm["top1_after"])} after.'
        )
    return parts


def _sizes(sizes: dict[str, int]) -> list[str]:
    titles = {
        'float': 'float network',
        'sum_of_bits': 'network at the bits of each weight',
        'packed.safetensors': '`packed.safetensors`',
        'model.onnx': '`model.onnx`',
        'slim.pth': '`slim.pth`',
    }
    rows = [(text, f'{sizes[name]:,}') for name, text in titles.items()]
    return ['## Bytes', table(['', 'bytes'], rows, 'lr')]


def _onnx(onnx: dict[str, Any]) -> list[str]:
    types = ', '.join(sorted(set(onnx['containers'].values())))
    kept = len(onnx['batch_norms_kept'])
    why = ': a negative slope would need a code that the type does not hold'
    operators = ', '.join(
        f'{n} {k}' for k, n in sorted(onnx['operators'].items())
    )
    return [
        '## model.onnx',
        f'Opset {onnx["opset"]}, weights as {types} (`--weights '
        f'{onnx["weights"]}`), residual sums `{onnx["residual"]}`. '
        f'{onnx["batch_norms_folded"]} batch norms folded, {kept} kept'
        f'{why if kept else ""}.',
        f'Operators that the runtime runs: {operators}.',
        'This form is small; the runtime computes it in float. '
        '`--weights int8` is the form for integer kernels.'
        if onnx['weights'] == 'typed'
        else _kernels(onnx),
        *(f'Note: {note}' for note in onnx['notes']),
    ]


def _kernels(onnx: dict[str, Any]) -> str:
    text = (
        f'{len(onnx["integer_layers"])} of {len(onnx["containers"])} '
        f'quantized layers run in integer kernels. {onnx["exact_channels"]} '
        'output channels have an integer bias that changes no code.'
    )
    for layer, channels in onnx['rounded_channels'].items():
        text += f'\n* `{layer}`: the bias of {channels} channels is rounded.'
    for layer, reason in onnx['float_layers'].items():
        text += f'\n* `{layer}` runs in float: {reason}.'
    return text


def _cost(report: dict[str, Any]) -> list[str]:
    guidance = report['guidance']
    parts = [
        '## Cost',
        f'{report["parameters"]:,} parameters, {report["multiply_adds"]:,} '
        f'multiply-adds, {report["bit_operations"]:,} bit-operations for one '
        f'image of (C, H, W) = {tuple(report["image_shape"])}.',
    ]
    if guidance['type']:
        cost = 'an unknown number of parameters and multiply-adds'
        if guidance['parameters'] is not None:
            cost = (
                f'{guidance["parameters"]:,} more parameters and '
                f'{guidance["multiply_adds"]:,} more multiply-adds'
            )
        parts.append(
            f'In training, {guidance["type"]} cost {cost} for each forward '
            f'pass; {report["guidance_left"]} of its tensors are left.'
        )
    head = [
        *('layer', 'W', 'A', 'weight range', 'levels', 'input range'),
        *('levels', 'multiply-adds', 'bit-operations', 'runs as'),
    ]
    rows = [
        (
            layer['name'],
            _bits(layer['weight_bits']),
            _bits(layer['activation_bits']),
            *_range_and_levels(layer, 'weight'),
            *_range_and_levels(layer, 'input'),
            f'{layer["multiply_adds"]:,}',
            f'{layer["bit_operations"]:,}',
            layer['operator'],
        )
        for layer in report['layers']
    ]
    return [*parts, table(head, rows, 'lrrrrrrrrl')]


def _bits(value: int) -> str:
    return 'float' if value == 32 else str(value)


def _range_and_levels(layer: dict[str, Any], role: str) -> tuple[str, Any]:
    if f'{role}_range' not in layer:
        return '', ''
    low, high = layer[f'{role}_range']
    return f'{low:.3g}..{high:.3g}', layer[f'{role}_levels'] or ''
