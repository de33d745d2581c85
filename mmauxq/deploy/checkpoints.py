"""What every export writes beside its own form: the network for PyTorch, its
packed codes, and the report."""

import copy
import json
import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmauxq.analysis import LevelCount, count_levels, deployed_bytes
from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.engine.hooks import reestimate_batch_norm
from mmauxq.errors import UsageError
from mmauxq.files import write_atomically
from mmauxq.layers import restore
from mmauxq.network.checkpoint import normalise
from mmauxq.text import percent

from .folder import PACKED, REPORT, SLIM, checksums
from .network import Network
from .onnx import verify
from .onnx.verify import Batches
from .packed import fill_packed, write_packed
from .slim import slim_checkpoint

Say = Callable[[str], None]
SAMPLE = 250


def sample_of(batches: Batches) -> Tensor:
    """Images for everything but the comparison of files with PyTorch."""
    return torch.cat([images for images, _ in batches[:2]])[:SAMPLE]


def write_for_pytorch(
    network: Network,
    checkpoint: str | os.PathLike,
    part: Path,
    batches: Batches,
    batch_norm: int,
    say: Say,
) -> tuple[dict[str, Any], list[LevelCount]]:
    """Write slim.pth and packed.safetensors, and check them.

    Args:
        network: Its batch norms are re-estimated first, if that is asked for.
        checkpoint: The file that it came from.
        part: Folder to write into.
        batches: To compare on.
        batch_norm: Training batches to re-estimate from; 0 for none.
        say: Takes a line for each step.

    Returns:
        What the report has of them, and the levels of all quantized tensors.
    """
    report: dict[str, Any] = {}
    sample = sample_of(batches)
    if batch_norm:
        norms = reestimate(network, batch_norm, batches, say)
        report['batch_norm'] = norms
    report['sizes'] = write_checkpoints(network, checkpoint, part, sample, say)
    architecture = network.architecture
    report['agreement'] = read_again(architecture, part, batches, say)
    return report, audit_levels(architecture, sample, say)


def write_report(
    part: Path, report: dict[str, Any], page: str, names: Sequence[str]
) -> None:
    """Write report.md, which is ``page``, and report.json, the last file,
    with the checksums of the others, ``names``."""
    write_atomically(part / 'report.md', page.encode())
    report['sha256'] = checksums(part, names)
    text = json.dumps(report, indent=1) + '\n'
    write_atomically(part / REPORT, text.encode())


def reestimate(
    network: Network, count: int, batches: Batches, say: Say
) -> dict[str, Any]:
    """Re-estimate batch norms from ``count`` training batches; what was seen,
    for the report."""

    def top1() -> float | None:
        logits = verify.all_logits(network.architecture, batches)
        return verify.top1(logits, batches)

    before = top1()
    training = islice(network.batches('train'), count)
    used = reestimate_batch_norm(
        network.architecture, (images for images, _ in training)
    )
    after = top1()
    say(
        f'batch norm: {used} batches, top-1 {percent(before)} before, '
        f'{percent(after)} after'
    )
    return dict(batches=used, top1_before=before, top1_after=after)


def write_checkpoints(
    network: Network,
    checkpoint: str | os.PathLike,
    part: Path,
    sample: Tensor,
    say: Say,
) -> dict[str, int]:
    """Write slim.pth and packed.safetensors; bytes by name."""
    architecture = network.architecture
    slim, packed = part / SLIM, part / PACKED
    meta = network.describe() | dict(description=network.algorithm.description)
    sizes = {
        'float': deployed_bytes(restore(copy.deepcopy(architecture))),
        'sum_of_bits': deployed_bytes(architecture),
        SLIM: slim_checkpoint(checkpoint, slim, architecture),
        PACKED: write_packed(architecture, packed, sample[:1], meta),
    }
    over = sizes[PACKED] / sizes['sum_of_bits'] - 1
    say(
        f'{SLIM}: {sizes[SLIM]:,} bytes; {PACKED}: {sizes[PACKED]:,} bytes '
        f'({over:+.1%} of the sum of bits)'
    )
    return sizes


@torch.no_grad()
def read_again(
    architecture: nn.Module, part: Path, batches: Batches, say: Say
) -> dict[str, dict[str, Any]]:
    """Load slim.pth and packed.safetensors as they were written, and run each
    on all images; what was seen, by name."""
    expected = verify.all_logits(architecture, batches)
    result = {}
    for name in (SLIM, PACKED):
        again = copy.deepcopy(architecture)
        for parameter in again.parameters():
            parameter.zero_()
        if name == PACKED:
            fill_packed(part / name, again)
        else:
            state = normalise(read_checkpoint(part / name), name)
            again.load_state_dict(state)
        logits = verify.all_logits(again, batches)
        if not torch.equal(logits, expected):
            raise UsageError(
                f'{name}: the network that was written and read again gives '
                'other logits'
            )
        top1 = verify.top1(logits, batches)
        result[name] = dict(bit_equal_on=len(logits), top1=top1)
        say(
            f'{name}: loads back to the bit on {len(logits)} images, top-1 '
            f'{percent(top1)}'
        )
    return result


def audit_levels(
    architecture: nn.Module, sample: Tensor, say: Say
) -> list[LevelCount]:
    """The levels of all quantized tensors, or a UsageError if one has more
    than its bits allow."""
    audit = count_levels(architecture, sample)
    wide = [count.name for count in audit if not count.holds]
    if wide:
        raise UsageError(f'{wide[0]} has more levels than its bits allow')
    say(f'levels: all {len(audit)} quantized tensors hold their bits')
    return audit
