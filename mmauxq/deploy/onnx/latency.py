"""How long a batch takes, form against form."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.config import Config

from mmauxq.errors import UsageError, one_line
from mmauxq.network import sample_images
from mmauxq.optional import need

from ..network import Network, build
from . import runtime
from .onnx_model import float_onnx, to_onnx
from .trace import INPUT, OUTPUT, trace

FORMS = {
    'typed': ('typed', 'float'),
    'int8': ('int8', 'float'),
    'int8, residual int8': ('int8', 'int8'),
}
"""Name -> weights and residual of :func:`.to_onnx`."""
Runner = Callable[[np.ndarray], Any]


def calibrated_network(cfg: Config) -> Network:
    """A network with random weights, and scales from generated images."""
    torch.manual_seed(0)
    algorithm = build(cfg, None).cpu()
    algorithm.init_weights()
    images = torch.randn(4, *algorithm.cost.shape)
    algorithm.train().calibrate(images)
    return Network(algorithm.eval(), cfg, {})


def forms_of(network: Network) -> dict[str, Any]:
    """The float export of a network and its quantized ones, ONNX models."""
    architecture, shape = network.architecture, network.algorithm.cost.shape
    images = sample_images(architecture, shape, 4)
    models = {'float': float_onnx(architecture, shape)}
    traced = trace(architecture, shape)
    for name, form in FORMS.items():
        models[name] = to_onnx(architecture, images, *form, traced).model
    return models


def onnxruntime_runner(model: Any, threads: int) -> Runner:
    """A function that runs a model in ONNX Runtime, on the CPU."""
    running = runtime.session(model, threads)
    return lambda images: running.run([OUTPUT], {INPUT: images})


def openvino_runner(model: Any, threads: int) -> Runner:
    """A function that runs a model in OpenVINO, on the CPU."""
    need('openvino')
    import openvino

    try:
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(model.SerializeToString()),
            'CPU',
            {
                'INFERENCE_NUM_THREADS': threads,
                'INFERENCE_PRECISION_HINT': 'f32',
                'PERFORMANCE_HINT': 'LATENCY',
            },
        )
    except Exception as error:  # the runtime's classes are not public
        raise UsageError(
            f'OpenVINO refuses the model ({one_line(error)})'
        ) from error
    request = compiled.create_infer_request()
    return lambda images: request.infer({INPUT: images})


def latencies(
    runners: Mapping[str, Runner], shape: Sequence[int], rounds: int
) -> dict[str, float]:
    """Median seconds of a batch (N, C, H, W), runners taking turns; before its
    ``rounds`` timed runs each has two that are not."""
    images = np.random.default_rng(0).standard_normal(shape)
    images = images.astype(np.float32)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 2):
        for name, run in runners.items():
            begin = time.perf_counter()
            run(images)
            if turn >= 2:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}
