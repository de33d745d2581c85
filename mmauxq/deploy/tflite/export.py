"""One folder with model.tflite and what else ships, checked against F."""

import json
import os
from typing import Any

import torch
from torch import nn

from mmauxq.analysis import deployed_bytes
from mmauxq.errors import UsageError
from mmauxq.files import write_atomically, written_together
from mmauxq.optional import need
from mmauxq.quantizers import named_quantizers
from mmauxq.text import percent
from mmauxq.version import __version__

from ..checkpoints import (
    Say,
    audit_levels,
    read_again,
    reestimate,
    write_checkpoints,
)
from ..folder import PACKED, REPORT, SLIM, check_folder, checksums
from ..network import Network, guidance_cost
from ..onnx import verify
from ..onnx.report import layer_table
from ..onnx.runtime import cpu_features, cpu_name
from ..onnx.verify import Agreement, Batches
from ..packed import weight_operands
from .convert import PACKAGES, Converted, to_tflite, version
from .flatbuffer import LIMIT, operators, stored_weights
from .report import as_markdown
from .session import Session

MODEL = 'model.tflite'
FILES = (SLIM, PACKED, MODEL, 'report.md', REPORT)
SAMPLE = 250
"""Images for everything but the comparison of the files with PyTorch."""


def export(
    network: Network,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    images: int = 1000,
    batch_norm: int = 0,
    say: Say = print,
) -> dict[str, Any]:
    """Write slim.pth, packed.safetensors, model.tflite and the report.

    Args:
        network: Of :func:`mmauxq.deploy.network.load_network`.
        checkpoint: The file that it came from.
        out: Folder, also one that holds other files. Files of an earlier
            export are replaced when all are written and checked.
        images: Validation images to compare on; 0 for a few generated ones.
        batch_norm: Training batches to re-estimate batch norms from first.
        say: Takes a line for each step.

    Returns:
        The report.

    Raises:
        UsageError: If something cannot be exported in this form.
        TrainingError: If the disk is full.
    """
    need('litert_torch', 'ai_edge_litert')
    out = check_folder(out, FILES)
    architecture = network.architecture
    if deployed_bytes(architecture) > LIMIT:
        raise UsageError(
            f'{MODEL}: expected at most {LIMIT:,} bytes, the limit of the '
            f'format, got {deployed_bytes(architecture):,}'
        )
    batches = network.images(images)
    sample = torch.cat([b for b, _ in batches[:2]])[:SAMPLE]
    report: dict[str, Any] = dict(mmauxq_version=__version__)
    report.update(network.describe(), real_images=bool(images))
    with written_together(out, REPORT) as part:
        if batch_norm:
            norms = reestimate(network, batch_norm, batches, say)
            report['batch_norm'] = norms
        sizes = write_checkpoints(network, checkpoint, part, sample, say)
        agreements = read_again(architecture, part, batches, say)
        audit = audit_levels(architecture, sample, say)
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
            sizes=sizes,
            tflite=dict(
                containers=containers,
                weight_codes=sum(
                    weight.index.size for weight in converted.weights.values()
                ),
                operators=operators(converted.content),
            ),
            agreement=agreements,
            runtime={
                **{package: version(package) for package in PACKAGES},
                'torch': torch.__version__,
                'cpu': cpu_name(),
                'cpu_features': cpu_features(),
            },
        )
        write_atomically(part / 'report.md', as_markdown(report).encode())
        report['sha256'] = checksums(part, FILES)
        page = json.dumps(report, indent=1) + '\n'
        write_atomically(part / REPORT, page.encode())
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
    if not result.holds:
        raise UsageError(
            f'{MODEL} differs from PyTorch: {result.unexplained} codes and '
            f'{result.unexplained_classes} classes away from rounding ties, '
            f'logits by {result.max_difference:.1e}'
        )
    say(
        f'agreement: same class for {result.same_class} of {result.images} '
        f'images, logits within {result.max_difference:.1e} (largest '
        f'{result.largest_logit:.1f}), top-1 {percent(result.top1)} (PyTorch '
        f'{percent(result.top1_torch)}); {result.codes:,} codes compared, '
        f'{result.ties} differ at rounding ties'
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
