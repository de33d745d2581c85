"""Count the levels of every quantized tensor on validation images, and fail
if one has more than 2**bits."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mmauxq.errors import UsageError
from mmauxq.optional import need

from .export import load
from .parser import add_network_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_network_arguments(parser, 256, 'validation images')
    parser.add_argument('--onnx', metavar='FILE', help='audit this file, too')


def run(args: argparse.Namespace, mark_running: Callable) -> int:
    """Print a line for each tensor; 1 if one has too many levels."""
    if args.onnx:
        if not Path(args.onnx).is_file():
            raise UsageError(f'--onnx {args.onnx} does not exist')
        need('onnx', 'onnxruntime')
    network = load(args)
    import torch

    from mmauxq.analysis import count_levels

    images = torch.cat([batch for batch, _ in network.images(args.images)])
    audits = {args.checkpoint: count_levels(network.architecture, images)}
    if args.onnx:
        from mmauxq.deploy.onnx.audit import audit_onnx

        audits[args.onnx] = audit_onnx(args.onnx, images.numpy())
    failed = False
    for source, counts in audits.items():
        for count in counts:
            print(
                f'{"ok  " if count.holds else "WIDE"} {count.levels:4d} '
                f'of {2**count.bits:4d} levels  {count.name}'
            )
        good = sum(count.holds for count in counts)
        failed |= good < len(counts)
        print(
            f'{source}: {good} of {len(counts)} '
            f'quantized tensors hold their bits on {len(images)} images of '
            f'(C, H, W) = {tuple(images.shape[1:])}'
        )
    return int(failed)
