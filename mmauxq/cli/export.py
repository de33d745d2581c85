"""Write what ships of a trained network - slim.pth, packed.safetensors,
model.onnx or model.tflite, report.json and report.md - and check that each
computes what was trained."""

import argparse
from collections.abc import Callable

from mmauxq import compat
from mmauxq.errors import UsageError
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
    from mmauxq.deploy.folder import check_folder

    weights = _form(args)
    if weights == 'tflite':
        _export_tflite(args)
        return
    check_folder(args.out)
    need('onnx', 'onnxscript', 'onnxruntime', 'safetensors')
    if weights == 'qonnx':
        need('qonnx')
    network = load(args)
    from mmauxq.deploy.onnx.export import export

    export(
        network,
        args.checkpoint,
        args.out,
        weights,
        args.residual,
        args.images,
        args.batch_norm,
        lambda line: print(line, flush=True),
    )


def _export_tflite(args: argparse.Namespace) -> None:
    need('litert_torch', 'ai_edge_litert', 'safetensors')
    from mmauxq.deploy.folder import check_folder
    from mmauxq.deploy.tflite.export import FILES, export

    check_folder(args.out, FILES)
    export(
        load(args),
        args.checkpoint,
        args.out,
        args.images,
        args.batch_norm,
        lambda line: print(line, flush=True),
    )
