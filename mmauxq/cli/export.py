"""Write what ships of a trained network - slim.pth, packed.safetensors,
model.onnx, report.json and report.md - and check that each computes what was
trained."""

import argparse
from collections.abc import Callable

from mmauxq import compat
from mmauxq.optional import need

from .load_config import load_config
from .parser import add_network_arguments, integer


def load(args: argparse.Namespace):
    """The network of ``args.config`` and ``args.checkpoint``."""
    from mmauxq.checkpoint_file import read_checkpoint

    cfg = load_config(args)
    read_checkpoint(args.checkpoint)  # before anything is built
    compat.enable()
    from mmauxq.deploy.network import load_network
    from mmauxq.engine.image_shape import set_image_shape

    set_image_shape(cfg, 'val')
    return load_network(cfg, args.checkpoint)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_network_arguments(parser, 1000, 'validation images to compare on')
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
        '--batch-norm',
        type=integer(0),
        default=0,
        metavar='N',
        help='first re-estimate batch-norm statistics from N batches',
    )


def run(args: argparse.Namespace, mark_running: Callable) -> None:
    """Export a trained network."""
    from mmauxq.deploy.folder import check_folder

    check_folder(args.out)
    need('onnx', 'onnxscript', 'onnxruntime', 'safetensors')
    network = load(args)
    from mmauxq.deploy.onnx.export import export

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
