"""How long a batch takes, form against form."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np

from mmauxq.errors import TrainingError, UsageError, one_line
from mmauxq.network import sample_images

from ..network import Network
from . import timed_process
from .trace import trace

FORMS = {
    'typed': ('typed', 'float'),
    'int8': ('int8', 'float'),
    'int8, residual int8': ('int8', 'int8'),
}
"""Name -> weights and residual of :func:`.to_onnx`."""
UNPACKED = 'typed, unpacked'
"""The typed file in ONNX Runtime, its weights unpacked as it is loaded."""


def forms_of(network: Network) -> dict[str, Any]:
    """The float export of a network and its quantized ones, ONNX models."""
    from .onnx_model import float_onnx, to_onnx

    architecture, shape = network.architecture, network.algorithm.cost.shape
    images = sample_images(architecture, shape, 4)
    models = {'float': float_onnx(architecture, shape)}
    traced = trace(architecture, shape)
    for name, form in FORMS.items():
        models[name] = to_onnx(architecture, images, *form, traced).model
    return models


class TimedForm:
    """A process that holds one form of a network, and times it when asked.

    Threads of a runtime wait actively for more work: in one process, those of
    a form would take the cores from the next.

    Args:
        kind: ``'onnxruntime'``, ``'unpacked'`` (ONNX Runtime, see
            :data:`UNPACKED`), ``'openvino'`` or ``'litert'``.
        content: Of an ONNX file, or of a .tflite file for ``'litert'``.
        threads: Of the runtime.
        shape: Of a batch, (N, C, H, W).

    Raises:
        UsageError: If the runtime refuses the model.
    """

    def __init__(
        self, kind: str, content: bytes, threads: int, shape: Sequence[int]
    ) -> None:
        self.connection, theirs = Pipe()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / 'model.onnx'
            file.write_bytes(content)
            words = [theirs.fileno(), kind, file, threads, *shape]
            self.process = subprocess.Popen(
                [sys.executable, timed_process.__file__, *map(str, words)],
                pass_fds=[theirs.fileno()],
                stdout=sys.stderr,
            )
            theirs.close()
            refusal = self._answer()
        if refusal is not None:
            self.close()
            raise UsageError(f'{kind} refuses the model ({one_line(refusal)})')

    def _answer(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            return f'its process ended with status {self.process.wait()}'

    def seconds(self) -> float:
        """Of one batch, after one that is not timed.

        Raises:
            TrainingError: If the process died.
        """
        with suppress(ConnectionError):  # there will be no answer
            self.connection.send(True)
        answer = self._answer()
        if isinstance(answer, str):
            raise TrainingError(f'latency: {answer}')
        return answer

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.wait()


@dataclass
class Latency:
    """Of one form.

    Args:
        seconds: First quartile, median and third quartile of a batch.
        speed_up: The same of the ratio of the first form's time in a round to
            this one's.
    """

    seconds: tuple[float, float, float]
    speed_up: tuple[float, float, float]


def latencies(
    forms: Mapping[str, TimedForm],
    rounds: int,
    report: Callable[[], None] = lambda: None,
) -> dict[str, Latency]:
    """Time each form once in each round; each round begins with another one.

    Args:
        forms: Name -> form; the first is the one to compare with.
        rounds: How many.
        report: Called after each round.
    """
    names = list(forms)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(forms[name].seconds())
        report()
    base = np.array(times[names[0]])
    return {
        name: Latency(_quartiles(values), _quartiles(base / values))
        for name, values in times.items()
    }


def _quartiles(values: Any) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return low, middle, high


def busy_cores(seconds: float = 1.0) -> float | None:
    """How many threads of other processes run or wait for a core, on average
    while this process waits; ``None`` if the system does not say."""
    counts = []
    for _ in range(max(1, round(seconds / 0.02))):
        time.sleep(0.02)
        try:
            words = Path('/proc/loadavg').read_text().split()
        except OSError:  # not Linux
            return None
        counts.append(int(words[3].partition('/')[0]) - 1)
    return sum(counts) / len(counts)
