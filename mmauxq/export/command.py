"""``tools/export.py``."""

import argparse
from collections.abc import Callable

from mmauxq import compat
from mmauxq.engine import command_line
from mmauxq.engine.checks import check_model


def load(args: argparse.Namespace):
    """The network of ``args.config`` and ``args.checkpoint``."""
    cfg = command_line.load_config(args)
    check_model(cfg, args.config)
    compat.load_checkpoint(args.checkpoint)  # before anything is built
    compat.enable()
    from .network import load_network

    return load_network(cfg, args.checkpoint)


def number(text: str) -> int:
    """For argparse: an integer from 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f'{text!r}; allowed are 0, 1, 2, ...')
    return int(text)


def export_command(argv: list[str] | None = None) -> int:
    """Export a trained network; returns the exit status."""
    parser = command_line.make_parser(
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
        type=number,
        default=1000,
        metavar='N',
        help='validation images to compare on (default: 1000); 0 for a few '
        'generated ones',
    )
    parser.add_argument(
        '--batch-norm',
        type=number,
        default=0,
        metavar='N',
        help='first re-estimate batch-norm statistics from N batches',
    )

    def command(args: argparse.Namespace, started: Callable) -> None:
        compat.enable()
        from .export import export
        from .folder import check_folder

        check_folder(args.out)
        network = load(args)
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

    return command_line.guard(parser, argv, command)
