"""Write what ships of a trained network - slim.pth, packed.safetensors,
model.onnx or model.tflite, report.json and report.md - and check that each
computes what was trained."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from mmauxq import compat
from mmauxq.errors import UsageError
from mmauxq.optional import need

from .load_config import load_config
from .parser import add_network_arguments, integer

if TYPE_CHECKING:
    from mmauxq.deploy.network import Network


def load(args: argparse.Namespace, every_layer: bool = False) -> 'Network':
    """The network of ``args.config`` and ``args.checkpoint``, by
    :func:`.load_network` or :func:`.load_every_layer`."""
    from mmauxq.checkpoint_file import read_checkpoint

    cfg = load_config(args)
    read_checkpoint(args.checkpoint)  # before anything is built
    compat.enable()
    from mmauxq.deploy.every_layer import load_every_layer
    from mmauxq.deploy.network import load_network
    from mmauxq.engine.image_shape import set_image_shape

    set_image_shape(cfg, 'val')
    build = load_every_layer if every_layer else load_network
    return build(cfg, args.checkpoint)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_network_arguments(parser, 1000, 'validation images to compare on')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder')
    parser.add_argument(
        '--format',
        choices=['onnx', 'qonnx', 'tflite'],
        default='onnx',
        help='of model.onnx: onnx, for ONNX Runtime and OpenVINO; qonnx: a '
        'Quant node for each quantizer, for FINN and hls4ml; or tflite: '
        'model.tflite, for LiteRT on phones',
    )
    parser.add_argument(
        '--weights',
        choices=['typed', 'int8'],
        help='typed: the narrowest ONNX type, small, computed in float '
        '(default); int8: the form that runtimes give to integer kernels, '
        'fast (both with --format onnx)',
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


def _form(args: argparse.Namespace) -> str:
    """The ``weights`` of the export; a UsageError if options contradict."""
    if args.format == 'onnx':
        return args.weights or 'typed'
    for name, value in (
        ('weights', args.weights),
        ('residual', args.residual == 'int8' and 'int8'),
    ):
        if value:
            raise UsageError(
                f'--format {args.format}: expected no --{name} beside it, '
                f'which is for --format onnx, got --{name} {value}'
            )
    return args.format


def run(args: argparse.Namespace, mark_running: Callable) -> None:
    """Export a trained network."""
    weights = _form(args)
    if weights == 'tflite':
        need('litert_torch', 'ai_edge_litert', 'safetensors')
    else:
        need('onnx', 'onnxscript', 'onnxruntime', 'safetensors')
    if weights == 'qonnx':
        need('qonnx')
    from mmauxq.deploy import folder

    how = dict(images=args.images, batch_norm=args.batch_norm)
    how['say'] = partial(print, flush=True)
    if weights == 'tflite':
        from mmauxq.deploy.tflite import export as tflite

        folder.check_folder(args.out, tflite.FILES)
        tflite.export(load(args), args.checkpoint, args.out, **how)
        return
    folder.check_folder(args.out)
    network = load(args)
    from mmauxq.deploy.onnx.export import export

    how |= dict(weights=weights, residual=args.residual)
    export(network, args.checkpoint, args.out, **how)
