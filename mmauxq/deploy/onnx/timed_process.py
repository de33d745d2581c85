"""A process that runs one file in one runtime, and is asked for times.

    python timed_process.py FD KIND FILE THREADS N C H W

Started by its path, without this package, so that it holds the runtime and
NumPy alone. Through the connection of file descriptor FD it sends ``None``
when the file is loaded, or the runtime's complaint, and then, for each
``True`` that it receives, the seconds of one batch.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Runner = Callable[[np.ndarray], Any]


def onnxruntime_session(
    model: str | bytes,
    threads: int,
    optimised: str | None = None,
    unpacked: bool = False,
) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        model: A file, or its content.
        threads: Of an operator. They wait actively while the model runs, as
            by default, and not when it has ended.
        optimised: Where the runtime writes the graph that it runs.
        unpacked: Integer weights become float ones as the model is loaded, as
            constants do elsewhere. By default the runtime keeps them for its
            integer kernels; where it has none, it unpacks them in each run.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry('session.force_spinning_stop', '1')
    if unpacked:
        options.add_session_config_entry('session.disable_quant_qdq', '1')
    if optimised is not None:
        options.optimized_model_filepath = optimised
    return onnxruntime.InferenceSession(
        model, options, providers=['CPUExecutionProvider']
    )


def onnxruntime_runner(
    file: str, threads: int, unpacked: bool = False
) -> Runner:
    """A function that runs a file in ONNX Runtime."""
    running = onnxruntime_session(file, threads, unpacked=unpacked)
    (name,) = (value.name for value in running.get_inputs())
    return lambda images: running.run(None, {name: images})


def openvino_compiled(model: Any, threads: int) -> Any:
    """An ``openvino.CompiledModel`` for the CPU that computes in float32 what
    the model does not quantize.

    Args:
        model: A file, or a model of OpenVINO.
        threads: Of the runtime.
    """
    import openvino

    return openvino.Core().compile_model(
        model,
        'CPU',
        {
            'INFERENCE_NUM_THREADS': threads,
            'INFERENCE_PRECISION_HINT': 'f32',
            'PERFORMANCE_HINT': 'LATENCY',
        },
    )


def openvino_runner(file: str, threads: int) -> Runner:
    """A function that runs a file in OpenVINO."""
    request = openvino_compiled(file, threads).create_infer_request()
    return lambda images: request.infer([images])


def litert_runner(file: str, threads: int) -> Runner:
    """A function that runs a file in the interpreter of LiteRT."""
    from ai_edge_litert.interpreter import Interpreter

    running = Interpreter(model_path=file, num_threads=threads)
    run = running.get_signature_runner()
    (name,) = run.get_input_details()
    return lambda images: run(**{name: images})


RUNTIMES = dict(
    onnxruntime=onnxruntime_runner,
    unpacked=partial(onnxruntime_runner, unpacked=True),
    openvino=openvino_runner,
    litert=litert_runner,
)


def serve(
    connection: Connection, kind: str, file: str, threads: int, shape: tuple
) -> None:
    """Answer until the other end is closed."""
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    try:
        run = RUNTIMES[kind](file, threads)
        run(images)
    except Exception as error:  # the classes of runtimes are not public
        connection.send(str(error) or repr(error))
        return
    connection.send(None)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        run(images)  # wakes the threads, and fills the caches
        begin = time.perf_counter()
        run(images)
        connection.send(time.perf_counter() - begin)


if __name__ == '__main__':
    descriptor, kind, file, *numbers = sys.argv[1:]
    threads, *shape = map(int, numbers)
    serve(Connection(int(descriptor)), kind, file, threads, tuple(shape))
