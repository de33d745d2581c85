"""ONNX Runtime: sessions, ranges of values, integer kernels."""

import platform
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmauxq.errors import UsageError, one_line
from mmauxq.optional import need

from .timed_process import onnxruntime_session
from .trace import INPUT

INTEGER_OPS = (
    'QLinearConv', 'QLinearMatMul', 'QGemm', 'QLinearAdd', 'ConvInteger',
    'MatMulInteger', 'MatMulIntegerToFloat', 'DynamicQuantizeMatMul',
)  # fmt: skip
CPU_FEATURES = (
    'avx2', 'avx512f', 'avx512_vnni', 'avx_vnni', 'amx_int8', 'asimddp',
    'i8mm',
)  # fmt: skip


def session(model: Any, threads: int = 1, optimised: Path | None = None):
    """An ``onnxruntime.InferenceSession`` on the CPU, or a UsageError if the
    runtime refuses the model. Its graph is written to ``optimised``."""
    need('onnxruntime')
    import onnxruntime

    file = None if optimised is None else str(optimised)
    try:
        return onnxruntime_session(model.SerializeToString(), threads, file)
    except Exception as error:  # the runtime's classes are not public
        raise UsageError(
            f'onnxruntime {onnxruntime.__version__} refuses the model '
            f'({one_line(error)})'
        ) from error


def with_outputs(model: Any, names: Sequence[str]) -> Any:
    """A copy of ``model`` that also gives inner values."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in names
    )
    return copy


def inner_values(
    model: Any,
    names: list[str],
    images: np.ndarray,
    start: Callable[[Any], Any] | None = None,
    size: int = 50,
) -> Iterator[dict[str, np.ndarray]]:
    """Values of ``model`` by name, for each batch of ``size`` images;
    ``start`` gives what runs it instead of ONNX Runtime."""
    running = (start or session)(with_outputs(model, names))
    for first in range(0, len(images), size):
        feed = {INPUT: images[first : first + size]}
        yield dict(zip(names, running.run(names, feed), strict=True))


def operators(model: Any) -> tuple[dict[str, int], dict[str, str]]:
    """What the runtime makes of a model: operator -> its number of nodes in
    the optimised graph; quantized layer -> its integer operator, if any."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'optimised.onnx'
        session(model, optimised=file)
        optimised = onnx.load(str(file))
    kernels = {}
    for node in optimised.graph.node:
        for name in node.input if node.op_type in INTEGER_OPS else ():
            layer, codes, _ = name.partition('.weight_quantizer.codes')
            if codes:
                kernels[layer] = node.op_type
    counts = Counter(node.op_type for node in optimised.graph.node)
    return dict(counts), kernels


def cpu_features() -> list[str]:
    """Features of this processor that integer kernels use (on Linux)."""
    words = set(_cpuinfo().split())
    return [name for name in CPU_FEATURES if name in words]


def cpu_name() -> str:
    """The name of the processor, from the operating system."""
    name = re.search(r'model name.*?: *(.*\S)', _cpuinfo())
    return name[1] if name else platform.processor()


def _cpuinfo() -> str:
    try:
        return Path('/proc/cpuinfo').read_text()
    except OSError:  # not Linux
        return ''
