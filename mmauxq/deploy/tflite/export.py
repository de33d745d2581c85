"""One folder with model.tflite and what else ships, checked against F."""

import os
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from mmauxq.analysis import deployed_bytes
from mmauxq.errors import UsageError
from mmauxq.files import write_atomically, written_together
from mmauxq.optional import need
from mmauxq.quantizers import named_quantizers
from mmauxq.version import __version__

from ..checkpoints import (
    Say,
    sample_of,
    write_for_pytorch,
    write_report,
)
from ..folder import PACKED, REPORT, SLIM, check_folder
from ..network import Network, guidance_cost
from ..onnx import verify
from ..onnx.report import layer_table
from ..onnx.runtime import cpu_features, cpu_name
from ..onnx.verify import Agreement, Batches
from ..packed import weight_operands
from .convert import PACKAGES, Converted, to_tflite
from .flatbuffer import LIMIT, operators, stored_weights
from .report import as_markdown
from .session import Session

MODEL = 'model.tflite'
FILES = (SLIM, PACKED, MODEL, 'report.md', REPORT)


def export(
    network: Network,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    images: int = 1000,
    batch_norm: int = 0,
    say: Say = print,
) -> dict[str, Any]:
    """Write slim.pth, packed.safetensors, model.tflite and the report, which
    is returned; the arguments and errors are those of
    :func:`mmauxq.deploy.onnx.export.export`."""
    need('litert_torch', 'ai_edge_litert')
    out = check_folder(out, FILES)
    architecture = network.architecture
    if deployed_bytes(architecture) > LIMIT:
        raise UsageError(
            f'{MODEL}: expected at most {LIMIT:,} bytes, the limit of the '
            f'format, got {deployed_bytes(architecture):,}'
        )
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
        about = network.describe() | network.usage()
        converted = to_tflite(architecture, sample[:1], about)
        sizes[MODEL] = len(converted.content)
        write_atomically(part / MODEL, converted.content)
        containers = {
            name: f'int{weight.bits}'
            for name, weight in converted.weights.items()
        }
        say(
            f'{MODEL}: {sizes[MODEL]:,} bytes; {len(containers)} weights as '
            f'{", ".join(sorted(set(containers.values())))}'
        )
        agreement = check(architecture, converted, batches, say)
        agreements[MODEL] = agreement.measured()
        report.update(
            layer_table(architecture, sample[:1], audit, {}),
            guidance=guidance_cost(network.cfg, sample.shape[1:]),
            tflite=dict(
                containers=containers,
                weight_codes=sum(
                    weight.index.size for weight in converted.weights.values()
                ),
                operators=operators(converted.content),
            ),
            runtime={
                **{package: version(package) for package in PACKAGES},
                'torch': torch.__version__,
                'cpu': cpu_name(),
                'cpu_features': cpu_features(),
            },
        )
        write_report(part, report, as_markdown(report), FILES)
    say(f'written: {out}')
    return report


def check(
    architecture: nn.Module, converted: Converted, batches: Batches, say: Say
) -> Agreement:
    """Compare model.tflite with PyTorch; a UsageError if it is another
    network."""
    wrong = differing_weights(architecture, converted, batches)
    if wrong:
        raise UsageError(
            f'{MODEL}: the codes of {wrong[0]} are not those of PyTorch'
        )
    result = verify.compare(
        architecture,
        converted.content,
        batches,
        converted,
        Session,
        lambda content, names: converted.inspected,
    )
    result.check(MODEL)
    say(
        result.line(
            f'{result.codes:,} codes compared, {result.ties} differ at '
            'rounding ties'
        )
    )
    return result


def differing_weights(
    architecture: nn.Module, converted: Converted, batches: Batches
) -> list[str]:
    """Weight quantizers whose codes in the file are not those of PyTorch."""
    stored = stored_weights(converted.content)
    quantizers = dict(named_quantizers(architecture))
    operands = weight_operands(architecture, batches[0][0][:1])
    left_out = [name for name in operands if name not in stored]
    if left_out:
        raise UsageError(
            f'{MODEL}: {left_out[0]}: expected a layer that changes the '
            'logits, got one that the converter left out, as behind a batch '
            'norm whose slopes are still zero; train the network first'
        )
    return [
        name
        for name, operand in operands.items()
        if not torch.equal(
            converted.weights[name].codes(torch.from_numpy(stored[name])),
            quantizers[name].codes(operand),
        )
    ]
