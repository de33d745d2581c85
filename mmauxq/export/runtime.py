"""ONNX Runtime: sessions, integer kernels, latency."""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmauxq.errors import UsageError

from .graph import count_ops
from .trace import INPUT, OUTPUT

INTEGER_OPS = (
    'QLinearConv', 'QLinearMatMul', 'QGemm', 'QLinearAdd', 'ConvInteger',
    'MatMulInteger', 'MatMulIntegerToFloat', 'DynamicQuantizeMatMul',
)  # fmt: skip


def session(model: Any, threads: int = 1, optimised: Path | None = None):
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        model: An ``onnx.ModelProto``, or a file.
        threads: Of one operator.
        optimised: File to write the graph to that really runs.

    Raises:
        UsageError: If the runtime refuses the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            'to run an exported network needs onnxruntime: '
            'pip install "mmauxq[export]"'
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    content = (
        model.SerializeToString()
        if hasattr(model, 'SerializeToString')
        else str(model)
    )
    try:
        return onnxruntime.InferenceSession(
            content, options, providers=['CPUExecutionProvider']
        )
    except Exception as error:  # the runtime's classes are not public
        reason = ' '.join(str(error).split())[:200]
        raise UsageError(
            f'onnxruntime {onnxruntime.__version__} refuses the model '
            f'({reason})'
        ) from error


def run(running: Any, images: np.ndarray, size: int = 250) -> np.ndarray:
    """Logits (N, K) of images (N, C, H, W), in batches."""
    return np.concatenate(
        [
            running.run([OUTPUT], {INPUT: images[i : i + size]})[0]
            for i in range(0, len(images), size)
        ]
    )


def with_outputs(model: Any, names: Sequence[str]) -> Any:
    """A copy of ``model`` that also gives inner values."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in names
    )
    return copy


def value_ranges(
    model: Any, names: Sequence[str], images: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Least and greatest value of inner values on sample images."""
    running = session(with_outputs(model, names))
    ranges = {name: (np.inf, -np.inf) for name in names}
    for start in range(0, len(images), 50):
        batch = {INPUT: images[start : start + 50]}
        for name, value in zip(names, running.run(names, batch), strict=True):
            low, high = ranges[name]
            ranges[name] = (
                min(low, float(value.min())),
                max(high, float(value.max())),
            )
    return ranges


def operators(model: Any) -> dict[str, int]:
    """Operator -> count, in the graph that the runtime made of a model."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'optimised.onnx'
        session(model, optimised=file)
        return count_ops(onnx.load(str(file)))


def latencies(
    models: Mapping[str, Any],
    shape: Sequence[int],
    batch: int,
    threads: int,
    rounds: int = 15,
) -> dict[str, tuple[float, float, float]]:
    """Seconds of a batch: median and quartiles, models taking turns.

    Args:
        models: Name -> model or file.
        shape: (C, H, W).
        batch: Images at once.
        threads: Of the runtime.
        rounds: Timed runs of each model, after two that are not.
    """
    running = {name: session(m, threads) for name, m in models.items()}
    images = np.random.default_rng(0).standard_normal((batch, *shape))
    feed = {INPUT: images.astype(np.float32)}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 2):
        for name, one in running.items():
            begin = time.perf_counter()
            one.run([OUTPUT], feed)
            if turn >= 2:
                times[name].append(time.perf_counter() - begin)
    return {
        name: (
            statistics.median(values),
            *np.percentile(values, [25, 75]).tolist(),
        )
        for name, values in times.items()
    }


def cpu_features() -> list[str]:
    """Those of this machine that integer kernels use (Linux)."""
    wanted = ('avx2', 'avx512f', 'avx512_vnni', 'avx_vnni', 'amx_int8',
              'asimddp', 'i8mm')  # fmt: skip
    try:
        words = set(Path('/proc/cpuinfo').read_text().split())
    except OSError:
        return []
    return [name for name in wanted if name in words]
