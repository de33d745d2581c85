"""One folder with all that ships, checked against F."""

import os
from collections import Counter
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from mmauxq.analysis import deployed_bytes
from mmauxq.errors import UsageError
from mmauxq.files import write_atomically, written_together
from mmauxq.optional import need
from mmauxq.version import __version__

from ..checkpoints import (
    Say,
    sample_of,
    write_for_pytorch,
    write_report,
)
from ..folder import FILES, REPORT, check_folder
from ..network import Network, guidance_cost
from . import qonnx_executor, runtime, verify
from .graph import Lowered, add_metadata
from .onnx_model import OPSETS, check_size, to_onnx
from .report import as_markdown, layer_table
from .trace import trace
from .verify import Batches


def export(
    network: Network,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    weights: str = 'typed',
    residual: str = 'float',
    images: int = 1000,
    batch_norm: int = 0,
    say: Say = print,
) -> dict[str, Any]:
    """Write slim.pth, packed.safetensors, model.onnx and the report.

    Args:
        network: Of :func:`mmauxq.deploy.network.load_network`.
        checkpoint: The file that it came from.
        out: Folder, also one that holds other files. Files of an earlier
            export are replaced when all are written and checked.
        weights, residual: See :func:`.to_onnx`.
        images: Validation images to compare on; 0 for a few generated ones.
        batch_norm: Training batches to re-estimate batch norms from first.
        say: Takes a line for each step.

    Returns:
        The report.

    Raises:
        UsageError: If something cannot be exported in this form.
        TrainingError: If the disk is full.
    """
    import onnx
    import onnxruntime

    if weights == 'qonnx':
        need('qonnx')
    if residual == 'int8' and weights != 'int8':
        raise UsageError(
            '--residual int8 is for integer kernels: expected --weights int8 '
            f'beside it, got {weights}'
        )
    out = check_folder(out)
    architecture = network.architecture
    check_size(deployed_bytes(architecture))  # before anything takes time
    batches = network.images(images)
    sample = sample_of(batches)
    report: dict[str, Any] = dict(mmauxq_version=__version__)
    report.update(network.describe(), real_images=bool(images))
    with written_together(out, REPORT) as part:
        found, audit = write_for_pytorch(
            network, checkpoint, part, batches, batch_norm, say
        )
        report.update(found)
        sizes, agreements = report['sizes'], report['agreement']
        lowered, notes = lower(architecture, sample, weights, residual, say)
        about = network.describe() | network.usage()
        add_metadata(lowered, architecture, about)
        content = lowered.model.SerializeToString()
        sizes['model.onnx'] = len(content)
        write_atomically(part / 'model.onnx', content)
        operators, kernels = _operators(lowered)
        runs = (
            f'{len(kernels)} of {len(lowered.containers)} quantized products '
            'run in integer kernels'
        )
        if lowered.weights == 'qonnx':
            runs = f'{operators["Quant"]} Quant nodes'
        say(
            f'model.onnx: opset {lowered.opset}, {sizes["model.onnx"]:,} '
            f'bytes; {runs}'
        )
        agreement = check(architecture, lowered, residual, batches, say)
        agreements['model.onnx'] = agreement.measured()
        report.update(
            layer_table(architecture, sample[:1], audit, kernels),
            guidance=guidance_cost(network.cfg, sample.shape[1:]),
            onnx=dict(
                weights=lowered.weights,
                residual=residual,
                opset=lowered.opset,
                opset_reason=OPSETS[lowered.opset],
                containers=lowered.containers,
                batch_norms_folded=len(lowered.folded),
                batch_norms_kept=lowered.kept,
                exact_channels=lowered.exact_channels,
                rounded_channels=lowered.rounded,
                saturating_layers=[
                    layer for layer in lowered.saturating if layer in kernels
                ],
                float_layers=lowered.float_layers,
                integer_layers=kernels,
                operators=operators,
                notes=notes,
            ),
            runtime=dict(
                onnxruntime=onnxruntime.__version__,
                onnx=onnx.__version__,
                torch=torch.__version__,
                cpu=runtime.cpu_name(),
                cpu_features=runtime.cpu_features(),
            ),
        )
        if lowered.weights == 'qonnx':
            report['runtime']['qonnx'] = version('qonnx')
        write_report(part, report, as_markdown(report), FILES)
    say(f'written: {out}')
    return report


def lower(
    architecture: nn.Module,
    images: Tensor,
    weights: str,
    residual: str,
    say: Say,
) -> tuple[Lowered, list[str]]:
    """The requested form, or the int8 one if the runtime refuses it; and what
    is to be told of that."""
    notes: list[str] = []
    traced = trace(architecture, images.shape[1:])
    if weights == 'qonnx':
        return to_onnx(architecture, images, weights, residual, traced), notes
    for kind in (weights, 'int8'):
        lowered = to_onnx(architecture, images, kind, residual, traced)
        try:
            runtime.session(lowered.model)
            break
        except UsageError as error:
            if kind == 'int8':
                raise
            notes.append(f'{error}; fell back to the int8 container')
            say(f'warning: {notes[-1]}')
    return lowered, notes


def _operators(lowered: Lowered) -> tuple[dict[str, int], dict[str, str]]:
    """See :func:`.runtime.operators`; of QONNX, the nodes of the file."""
    if lowered.weights != 'qonnx':
        return runtime.operators(lowered.model)
    return dict(Counter(n.op_type for n in lowered.model.graph.node)), {}


def check(
    architecture: nn.Module,
    lowered: Lowered,
    residual: str,
    batches: Batches,
    say: Say,
) -> verify.Agreement:
    """Compare model.onnx with PyTorch; a UsageError if it is another
    network."""
    model = lowered.model
    differing, start = verify.differing_weights, runtime.session
    if lowered.weights == 'qonnx':
        differing = qonnx_executor.differing_weights
        start = qonnx_executor.Session
    wrong = differing(architecture, lowered, batches[0][0][:1])
    if wrong:
        raise UsageError(
            f'model.onnx: the codes of {wrong[0]} are not those of PyTorch'
        )
    if residual == 'float':
        result = verify.compare(architecture, model, batches, lowered, start)
        result.check('model.onnx')
        codes = (
            f'{result.codes:,} codes compared, {result.ties} differ at '
            f'rounding ties, {result.rounded} by rounded biases'
        )
    else:
        result = verify.compare(architecture, model, batches)
        codes = (
            'residual sums in 8 bits are another network: codes not compared'
        )
    say(result.line(codes))
    return result
