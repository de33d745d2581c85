"""``tools/audit.py``."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mmauxq import compat
from mmauxq.engine import command_line
from mmauxq.errors import UsageError

from .command import load, number


def audit_command(argv: list[str] | None = None) -> int:
    """Count levels; 1 if a tensor has more than its bits allow."""
    parser = command_line.make_parser(
        'Count the levels of every quantized tensor on validation images, '
        'and fail if one has more than 2**bits.'
    )
    parser.add_argument('checkpoint', help='training checkpoint or slim one')
    parser.add_argument('--onnx', metavar='FILE', help='audit this file, too')
    parser.add_argument(
        '--images', type=number, default=256, metavar='N',
        help='validation images (default: 256); 0 for a few generated ones',
    )  # fmt: skip
    failed = []

    def command(args: argparse.Namespace, started: Callable) -> None:
        compat.enable()
        from mmauxq.evaluation import count_levels

        from .audit import audit_onnx
        from .network import first_images

        if args.onnx and not Path(args.onnx).is_file():
            raise UsageError(f'--onnx {args.onnx} does not exist')
        network = load(args)
        import torch

        batches = first_images(network, args.images)
        images = torch.cat([images for images, _ in batches])
        audits = {args.checkpoint: count_levels(network.architecture, images)}
        if args.onnx:
            audits[args.onnx] = audit_onnx(args.onnx, images.numpy())
        for source, counts in audits.items():
            for count in counts:
                print(
                    f'{"ok  " if count.holds else "WIDE"} {count.levels:4d} '
                    f'of {2**count.bits:4d} levels  {count.name}'
                )
            wide = [count for count in counts if not count.holds]
            failed.extend(wide)
            print(
                f'{source}: {len(counts) - len(wide)} of {len(counts)} '
                f'quantized tensors hold their bits on {len(images)} images'
            )

    status = command_line.guard(parser, argv, command)
    return status or int(bool(failed))
