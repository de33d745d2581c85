"""The report of an export to .tflite, as a page for people."""

from typing import Any

from mmauxq.text import percent

from ..onnx.report import CODES, LAYERS, as_page, in_form

COMPARED = (
    f'{LAYERS} All {{weight_codes:,}} codes of weights were read from the '
    'file and are those of the quantizers.'
)
FORM = """\
Weights as {types}, which `DEQUANTIZE` turns into float. Products, and the \
rounding and clipping of activations, are float arithmetic: this form is \
small, not fast. It takes one image.

Operators of the file: {operators}."""


def as_markdown(report: dict[str, Any]) -> str:
    """``report.json`` as a page."""
    tflite, runtime = report['tflite'], report['runtime']
    norms = {}
    if 'batch_norm' in report:
        norm = report['batch_norm']
        name = f'top-1 before {norm["batches"]} batches for batch norms'
        norms[name] = percent(norm['top1_before'])
    packages = ('litert-torch', 'ai-edge-litert')
    return as_page(
        report,
        'model.tflite',
        # no bias is rounded in this form
        {name: key for name, key in CODES.items() if 'rounded' not in key},
        norms,
        versions=', '.join(f'{name} {runtime[name]}' for name in packages),
        engine='the interpreter of LiteRT',
        compared=COMPARED.format(**tflite),
        form=FORM.format(**in_form(tflite)),
    )
