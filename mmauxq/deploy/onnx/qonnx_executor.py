"""QONNX models in the executor of the package qonnx."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from mmauxq.errors import UsageError, one_line
from mmauxq.optional import need
from mmauxq.quantizers import named_quantizers

from ..packed import weight_operands
from .trace import INPUT

if TYPE_CHECKING:
    from .graph import Lowered

DOMAIN = 'qonnx.custom_op.general'
# ``IntQuant`` is its newer name. The clean-up of the package, and FINN, handle
# quantizers of this name alone.
OPERATOR = 'Quant'
# The executor keeps every value of the graph.
MOST_VALUES = 2**28


class Session:
    """Runs a model as an ``onnxruntime.InferenceSession`` does, for any number
    of images, and gives the codes of quantizers.

    Args:
        model: Its input has a shape of one image.

    Raises:
        UsageError: If the package refuses the model.
    """

    def __init__(self, model: Any) -> None:
        need('qonnx')
        self._model = model
        self._sizes: dict[int, Any] = {}
        self._quants = {
            node.output[0]: node
            for node in model.graph.node
            if node.op_type == OPERATOR
        }
        one = self._of_size(1)
        values = one.make_empty_exec_context().values()
        most = sum(value.size for value in values if value is not None)
        self._at_once = max(MOST_VALUES // most, 1)

    def run(
        self, names: Sequence[str], feed: dict[str, np.ndarray]
    ) -> list[np.ndarray]:
        """Values by name, (N, ...); of a ``Quant`` node the codes."""
        from qonnx.core.onnx_exec import execute_onnx

        images, parts = feed[INPUT], []
        for start in range(0, len(images), self._at_once):
            part = images[start : start + self._at_once]
            try:
                context = execute_onnx(
                    self._of_size(len(part)), {INPUT: part}, True
                )
            except Exception as error:  # a bare one, or the runtime's
                raise _refused(error) from error
            parts.append([self._codes(name, context) for name in names])
        return [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]

    def _of_size(self, images: int) -> Any:
        """The same graph for another number of images, with all shapes."""
        if images not in self._sizes:
            from qonnx.core.modelwrapper import ModelWrapper
            from qonnx.transformation.infer_shapes import InferShapes

            model = ModelWrapper(self._model, make_deepcopy=True)
            del model.graph.output[1:]  # all values are in the context
            for value in (*model.graph.input, *model.graph.output):
                value.type.tensor_type.shape.dim[0].dim_value = images
            try:
                model = model.transform(InferShapes())
                model.check_all_tensor_shapes_specified(True)
            except Exception as error:  # whatever inference runs into
                raise _refused(error) from error
            self._sizes[images] = model
        return self._sizes[images]

    def _codes(self, name: str, context: dict[str, np.ndarray]) -> np.ndarray:
        """A value, or the codes of one that a ``Quant`` node gives."""
        value = context[name]
        if name not in self._quants:
            return value
        scale = context[self._quants[name].input[1]]
        codes = np.rint(value / scale)
        if not np.array_equal(codes * scale, value):
            raise UsageError(f'{name}: expected multiples of its scale')
        return codes.astype(np.int32)


def differing_weights(
    architecture: nn.Module, lowered: 'Lowered', image: Tensor
) -> list[str]:
    """Weight quantizers whose codes in the file are not those of PyTorch."""
    operands = weight_operands(architecture, image)
    quantizers = dict(named_quantizers(architecture))
    names = list(lowered.containers)
    values = [f'{name}.value' for name in names]
    codes = Session(lowered.model).run(values, {INPUT: image.numpy()})
    return [
        name
        for name, found in zip(names, codes, strict=True)
        if not np.array_equal(
            found, quantizers[name].codes(operands[name]).numpy()
        )
    ]


def _refused(error: Exception) -> UsageError:
    return UsageError(
        f'qonnx {version("qonnx")} refuses the model ({one_line(error)})'
    )
