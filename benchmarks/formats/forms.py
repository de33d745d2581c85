"""What each exported form of a network is, and what runtimes make of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmauxq.analysis import layer_costs
from mmauxq.cli.latency import timed
from mmauxq.deploy.checkpoints import sample_of, write_for_pytorch
from mmauxq.deploy.folder import PACKED
from mmauxq.deploy.network import Network
from mmauxq.deploy.onnx import latency
from mmauxq.errors import UsageError
from mmauxq.network import sample_images
from mmauxq.optional import need
from mmauxq.quantizers import FLOAT_BITS

Row = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A form that can be exported.

    Args:
        packages: What its export needs.
        file: Its name in the folder of an export.
        runtimes: The first is the one that the export runs the file in.
        options: ``weights`` and ``residual`` of the ONNX export.
    """

    packages: tuple[str, ...]
    file: str
    runtimes: tuple[str, ...]
    options: tuple[str, str] = ('', '')


ONNX = ('onnx', 'onnxscript', 'onnxruntime', 'safetensors')
LITERT = ('litert_torch', 'ai_edge_litert', 'safetensors')
TWO = ('onnxruntime', 'openvino')
FORMS = {
    'typed': Form(ONNX, 'model.onnx', TWO, ('typed', 'float')),
    'int8': Form(ONNX, 'model.onnx', TWO, ('int8', 'float')),
    'int8-residual': Form(ONNX, 'model.onnx', TWO, ('int8', 'int8')),
    'qonnx': Form(
        (*ONNX, 'qonnx'), 'model.onnx', ('qonnx',), ('qonnx', 'float')
    ),
    'tflite': Form(LITERT, 'model.tflite', ('litert',)),
    'packed': Form(('safetensors',), PACKED, ('torch',)),
}
"""Name in ``--forms`` -> form."""
PACKAGES = dict(litert='ai-edge-litert')
"""Runtime -> its package, where that has another name."""
TIMED = ('onnxruntime', 'openvino', 'litert')
"""Runtimes of :class:`.TimedForm`."""
IN_FLOAT = 'computes in float'
COMPARED = ('codes', 'ties', 'rounded', 'unexplained')


class Generated(Network):
    """A network whose images are generated, as its weights are."""

    def images(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """``count`` images, in batches of at most 250, without labels."""
        shape = self.algorithm.cost.shape
        images = sample_images(self.architecture, shape, count)
        return [(x, torch.full((len(x),), -1)) for x in images.split(250)]


def exported(
    network: Network,
    bits: str,
    forms: Sequence[str],
    images: int,
    folder: Path,
    report: Callable[[], None] = lambda: None,
) -> tuple[list[Row], dict[str, bytes]]:
    """Export a network in each form, and run it in each runtime.

    Args:
        network: Of :func:`mmauxq.deploy.network.calibrated_network`.
        bits: Of its weights and activations, such as ``'4/8'``.
        forms: Keys of :data:`FORMS`.
        images: Number of generated images to compare on.
        folder: To write into.
        report: Called after each form.

    Returns:
        A row for each form and runtime, whose ``error`` says in one line why
        it is refused; and the file of each form.
    """
    network = Generated(network.algorithm, network.cfg, network.meta)
    checkpoint = folder / 'network.pth'
    torch.save(dict(state_dict=network.algorithm.state_dict()), checkpoint)
    rows: list[Row] = []
    contents = {}
    for name in forms:
        form, out = FORMS[name], folder / name
        base: Row = dict(bits=bits, form=name)
        try:
            need(*form.packages)
            base |= _export(network, form, checkpoint, out, images)
        except UsageError as error:
            base |= dict(error=str(error))
            rows += [_row(base, runtime) for runtime in form.runtimes]
        else:
            contents[name] = (out / form.file).read_bytes()
            rows.append(_row(base, form.runtimes[0]))
            if 'openvino' in form.runtimes:
                rows.append(_in_openvino(rows[-1], network, form, images))
        report()
    return rows, contents


def time_rows(
    rows: Sequence[Row],
    contents: Mapping[str, bytes],
    network: Network,
    rounds: int,
) -> None:
    """Time what runs, one image at a time on one thread, and note it.

    Args:
        rows: Rows that :func:`exported` gave; those that run are written to.
        contents: The files that it gave, by form.
        network: The network that was exported.
        rounds: Timed runs of each form.
    """
    shape = network.algorithm.cost.shape
    for runtime in TIMED:
        mine = [row for row in rows if row['runtime'] == runtime]
        mine = [row for row in mine if row.get('runs')]
        if not mine:
            continue
        files = {'float': _float(network, runtime)}
        files |= {row['form']: contents[row['form']] for row in mine}
        busy = latency.busy_cores()
        try:
            found, refused = timed(runtime, files, 1, (1, *shape), rounds)
        except UsageError as error:  # it refuses the float form
            refused = dict.fromkeys(files, str(error))
        for row in mine:
            if row['form'] in refused:
                row['error'] = refused[row['form']]
                continue
            of = found[row['form']]
            row.update(ms=of.seconds[1] * 1e3, speed_up=of.speed_up)
            row.update(float_ms=found['float'].seconds[1] * 1e3, busy=busy)


def arm(bits: str, form: str, runtime: str) -> str:
    """The name of a row."""
    return f'{bits}/{form}/{runtime}'


def _row(base: Row, runtime: str) -> Row:
    name = arm(base['bits'], base['form'], runtime)
    return dict(base, arm=name, runtime=runtime)


def _export(
    network: Network, form: Form, checkpoint: Path, out: Path, images: int
) -> Row:
    """What the export of a form, which runs the file, found."""
    export = EXPORTS[form.file]
    report, types, found = export(network, form, checkpoint, out, images)
    (image, _), *_ = network.images(1)
    costs = layer_costs(network.architecture, image)
    names = [name.replace('int', 'INT') for name in sorted(types)]
    if any(cost.weight_bits == FLOAT_BITS for cost in costs):
        names += [] if 'float' in names[0] else ['float']
    runtime = PACKAGES.get(form.runtimes[0], form.runtimes[0])
    found |= dict(
        loads=True,
        runs=True,
        version=report['runtime'][runtime],
        weights=', '.join(names),
        bytes=report['sizes'][form.file],
        float_bytes=report['sizes']['float'],
    )
    return found | _compared(report['agreement'][form.file])


Found = tuple[dict[str, Any], set[str], Row]
"""A report, the types of quantized weights, and what else a row has."""


def _onnx(
    network: Network, form: Form, checkpoint: Path, out: Path, images: int
) -> Found:
    from mmauxq.deploy.onnx.export import export

    report = export(
        network, checkpoint, out, *form.options, images, say=_silent
    )
    about = report['onnx']
    types = set(about['containers'].values())
    if about['weights'] != form.options[0]:  # it fell back to another form
        raise UsageError(about['notes'][0])
    if about['weights'] == 'qonnx':
        types = {f'float behind Quant of {kind}' for kind in types}
        return report, types, dict(remark='to check with, not timed')
    found = _kernels(len(about['integer_layers']), len(about['containers']))
    if about['saturating_layers']:
        count = len(about['saturating_layers'])
        found['remark'] += f'; {count} may saturate without VNNI'
    return report, types, found


def _tflite(
    network: Network, form: Form, checkpoint: Path, out: Path, images: int
) -> Found:
    from mmauxq.deploy.tflite.export import export

    report = export(network, checkpoint, out, images, say=_silent)
    types = set(report['tflite']['containers'].values())
    return report, types, dict(remark=IN_FLOAT)


def _packed(
    network: Network, form: Form, checkpoint: Path, out: Path, images: int
) -> Found:
    out.mkdir()
    batches = network.images(images)
    report, audit = write_for_pytorch(
        network, checkpoint, out, batches, 0, _silent
    )
    report['runtime'] = dict(torch=torch.__version__)
    types = {
        f'{count.bits} bits'
        for count in audit
        if count.name.endswith('weight_quantizer')
    }
    return report, types, dict(remark='logits of PyTorch to the bit')


EXPORTS = {'model.onnx': _onnx, 'model.tflite': _tflite, PACKED: _packed}


def _silent(line: str) -> None:
    """Tell nobody what an export says."""


def _kernels(kernels: int, products: int) -> Row:
    remark = f'{kernels} of {products} layers in integer kernels'
    return dict(
        kernels=kernels,
        products=products,
        remark=remark if kernels else IN_FLOAT,
    )


def _compared(agreement: Mapping[str, Any]) -> Row:
    """What was compared: codes, if they were, and logits."""
    found = {key: agreement[key] for key in COMPARED if key in agreement}
    if 'max_difference' in agreement:
        largest = agreement['largest_logit']
        found['logits'] = agreement['max_difference'] / (largest or 1.0)
    return found


def _in_openvino(first: Row, network: Network, form: Form, images: int) -> Row:
    """The row of OpenVINO, which the export does not run."""
    from mmauxq.deploy.onnx.export import lower

    from . import openvino_session

    kept = 'bits', 'form', 'weights', 'bytes', 'float_bytes'
    row = _row({key: first[key] for key in kept}, 'openvino')
    architecture, batches = network.architecture, network.images(images)
    try:
        need('openvino')
        row['version'] = openvino_session.version()
        lowered, _ = lower(
            architecture, sample_of(batches), *form.options, _silent
        )
        row.update(loads=False, runs=False)
        running = openvino_session.Session(lowered.model)
        row['loads'] = True
        codes = form.options[1] == 'float'
        agreement = openvino_session.compare(
            architecture, lowered, batches, codes
        )
    except UsageError as error:
        return row | dict(error=str(error))
    row |= _kernels(running.integer_products(), first['products'])
    return row | dict(runs=True) | _compared(agreement.measured())


def _float(network: Network, runtime: str) -> bytes:
    """The file of the network without quantizers."""
    architecture, shape = network.architecture, network.algorithm.cost.shape
    if runtime == 'litert':
        from mmauxq.deploy.tflite.convert import float_tflite

        return float_tflite(architecture, sample_images(architecture, shape))
    from mmauxq.deploy.onnx.onnx_model import float_onnx

    return float_onnx(architecture, shape).SerializeToString()
