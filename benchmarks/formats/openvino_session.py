"""An ONNX model in OpenVINO, beside PyTorch."""

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from torch import nn

from mmauxq.deploy.onnx import verify
from mmauxq.deploy.onnx.graph import Lowered
from mmauxq.deploy.onnx.runtime import with_outputs
from mmauxq.deploy.onnx.timed_process import openvino_compiled
from mmauxq.deploy.onnx.verify import Agreement, Batches
from mmauxq.errors import UsageError, one_line
from mmauxq.optional import need

PRODUCTS = ('Convolution', 'FullyConnected', 'MatMul')
"""Types of layers in the graph that OpenVINO runs."""


class Session:
    """Runs a model as an ``onnxruntime.InferenceSession`` does, on one thread
    of the CPU.

    Args:
        model: An ``onnx.ModelProto``.

    Raises:
        UsageError: If OpenVINO refuses the model.
    """

    def __init__(self, model: Any) -> None:
        need('openvino')
        import openvino

        content = BytesIO(model.SerializeToString())
        try:
            read = openvino.Core().read_model(content)
            self._compiled = openvino_compiled(read, 1)
        except RuntimeError as error:
            raise _refused(error) from error

    def run(
        self, names: Sequence[str], feed: dict[str, np.ndarray]
    ) -> list[np.ndarray]:
        """Outputs by name, (N, ...)."""
        try:
            found = self._compiled(feed)
        except RuntimeError as error:
            raise _refused(error) from error
        return [found[name] for name in names]

    def integer_products(self) -> int:
        """How many products OpenVINO computes from 8-bit integers."""
        nodes = self._compiled.get_runtime_model().get_ops()
        infos = [node.get_rt_info() for node in nodes]
        return sum(
            info['layerType'].astype(str) in PRODUCTS
            and info['runtimePrecision'].astype(str) in ('i8', 'u8')
            for info in infos
        )


def compare(
    architecture: nn.Module,
    lowered: Lowered,
    batches: Batches,
    codes: bool,
) -> Agreement:
    """:func:`.verify.compare`, in which the logits are those of the file.

    OpenVINO runs other kernels for a graph whose codes are read, so that the
    codes come from such a graph, and the logits do not.

    Args:
        architecture: The network in PyTorch.
        lowered: Its file.
        batches: To compare on.
        codes: Whether to compare them.
    """
    alone = verify.compare(architecture, lowered.model, batches, None, Session)
    if not codes:
        return alone
    names = [value for value, _ in lowered.codes.values()]
    inspected = Session(with_outputs(lowered.model, names))
    result = verify.compare(
        architecture, lowered.model, batches, lowered, lambda _: inspected
    )
    result.max_difference = alone.max_difference
    return result


def _refused(error: RuntimeError) -> UsageError:
    """In one line, without the places in its source that it begins with."""
    lines = str(error).splitlines()
    reason = ' '.join(x for x in lines if not x.startswith('Exception from'))
    return UsageError(
        f'openvino {version()} refuses the model '
        f'({one_line(RuntimeError(reason), 80)})'
    )


def version() -> str:
    """That of OpenVINO, without its build."""
    import openvino

    return openvino.__version__.partition('-')[0]
