"""``tools/export.py`` and ``tools/audit.py``."""

import argparse
from collections.abc import Callable
from pathlib import Path

from mmauxq import compat
from mmauxq.engine import launch
from mmauxq.errors import UsageError


def _load(args: argparse.Namespace):
    cfg = launch.load_config(args)
    launch._check_model(cfg, args.config)
    compat.load_checkpoint(args.checkpoint)  # before anything is built
    compat.enable()
    from .network import load_network

    return load_network(cfg, args.checkpoint)


def _number(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f'{text!r}; allowed are 0, 1, 2, ...')
    return int(text)


def export_command(argv: list[str] | None = None) -> int:
    """Export a trained network; returns the exit status."""
    parser = launch._parser(
        'Write what ships of a trained network - slim.pth, '
        'packed.safetensors, model.onnx, report.json and report.md - and '
        'check that each computes what was trained.'
    )
    parser.add_argument('checkpoint', help='training checkpoint or slim one')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder')
    parser.add_argument(
        '--weights',
        choices=['typed', 'int8'],
        default='typed',
        help='typed: the narrowest ONNX type, small, computed in float; '
        'int8: the form that runtimes give to integer kernels, fast',
    )
    parser.add_argument(
        '--residual',
        choices=['float', 'int8'],
        default='float',
        help='int8: quantize residual sums to 8 bits, so that all products '
        'run in integer kernels (with --weights int8)',
    )
    parser.add_argument(
        '--images',
        type=_number,
        default=1000,
        metavar='N',
        help='validation images to compare on (default: 1000); 0 for a few '
        'generated ones',
    )
    parser.add_argument(
        '--batch-norm',
        type=_number,
        default=0,
        metavar='N',
        help='first re-estimate batch-norm statistics from N batches',
    )

    def command(args: argparse.Namespace, started: Callable) -> None:
        compat.enable()
        from .export import export
        from .folder import check_folder

        check_folder(args.out)
        network = _load(args)
        export(
            network,
            args.checkpoint,
            args.out,
            args.weights,
            args.residual,
            args.images,
            args.batch_norm,
            lambda line: print(line, flush=True),
        )

    return launch._guard(parser, argv, command)


def audit_command(argv: list[str] | None = None) -> int:
    """Count levels; 1 if a tensor has more than its bits allow."""
    parser = launch._parser(
        'Count the levels of every quantized tensor on validation images, '
        'and fail if one has more than 2**bits.'
    )
    parser.add_argument('checkpoint', help='training checkpoint or slim one')
    parser.add_argument('--onnx', metavar='FILE', help='audit this file, too')
    parser.add_argument(
        '--images', type=_number, default=256, metavar='N',
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
        network = _load(args)
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

    status = launch._guard(parser, argv, command)
    return status or int(bool(failed))
