"""The report of an export to .tflite, as a page for people."""

from typing import Any

from mmauxq.text import percent, table

from ..onnx.report import HEAD, layer_row, training_cost

PAGE = """\
# Export report

MMAuxQ {mmauxq_version}, torch {runtime[torch]}, litert-torch \
{runtime[litert-torch]}, ai-edge-litert {runtime[ai-edge-litert]}; \
{runtime[cpu]} ({features}).

## Agreement with the PyTorch network

On {images} images, {origin}. `slim.pth` and `packed.safetensors` were loaded \
again and ran on all of them: they give the logits of the PyTorch network to \
the bit. `model.tflite` ran in the interpreter of LiteRT on all of them, too:

{agreement}

Each layer is compared from the same codes before it. All \
{tflite[weight_codes]:,} codes of weights were read from the file and are \
those of the quantizers.

## Bytes

{bytes}

## model.tflite

Weights as {types}, which `DEQUANTIZE` turns into float. Products, and the \
rounding and clipping of activations, are float arithmetic: this form is \
small, not fast. It takes one image.

Operators of the file: {operators}.

## Cost

{parameters:,} parameters, {multiply_adds:,} multiply-adds, \
{bit_operations:,} bit-operations for one image of (C, H, W) = {shape}.\
{training}

{layers}"""


def as_markdown(report: dict[str, Any]) -> str:
    """``report.json`` as a page."""
    sizes, seen = report['sizes'], report['agreement']['model.tflite']
    top1 = {name: one['top1'] for name, one in report['agreement'].items()}
    rows = [('top-1 of PyTorch', percent(seen['top1_torch']))]
    rows += [(f'top-1 of `{n}`', percent(value)) for n, value in top1.items()]
    if 'batch_norm' in report:
        norm = report['batch_norm']
        before = percent(norm['top1_before'])
        name = f'top-1 before {norm["batches"]} batches for batch norms'
        rows.append((name, before))
    largest = f'largest logit {seen["largest_logit"]:.1f}'
    rows += [
        ('images with the same class', seen['same_class']),
        (
            'largest difference of logits',
            f'{seen["max_difference"]:.1e} ({largest})',
        ),
        ('activation codes compared', f'{seen["codes"]:,}'),
        ('differ at a rounding tie', seen['ties']),
        ('differ otherwise', seen['unexplained']),
        ('images in which one differs', seen['images_touched']),
    ]
    files = ('packed.safetensors', 'model.tflite', 'slim.pth')
    size_rows = [
        ('float network', f'{sizes["float"]:,}'),
        ('network at the bits of each weight', f'{sizes["sum_of_bits"]:,}'),
        *((f'`{name}`', f'{sizes[name]:,}') for name in files),
    ]
    operators = sorted(report['tflite']['operators'].items())
    page = {
        **report,
        'features': ', '.join(report['runtime']['cpu_features']),
        'images': seen['images'],
        'origin': ('generated', 'of the validation set')[
            report['real_images']
        ],
        'agreement': table(('', 'measured'), rows, 'lr').rstrip(),
        'bytes': table(('', 'bytes'), size_rows, 'lr').rstrip(),
        'types': ', '.join(
            sorted(set(report['tflite']['containers'].values()))
        ),
        'operators': ', '.join(f'{count} {name}' for name, count in operators),
        'shape': tuple(report['image_shape']),
        'training': training_cost(report['guidance']),
        'layers': table(HEAD, map(layer_row, report['layers']), 'lrrrrrrrrl'),
    }
    return PAGE.format(**page)
