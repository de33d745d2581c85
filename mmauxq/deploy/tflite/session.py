"""A .tflite file in the interpreter of LiteRT."""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from mmauxq.errors import UsageError, one_line
from mmauxq.optional import need

from ..onnx.trace import INPUT


class Session:
    """Runs a file as an ``onnxruntime.InferenceSession`` does, image by
    image, on one thread of the CPU.

    Args:
        content: Of the file.

    Raises:
        UsageError: If the interpreter refuses the file.
    """

    def __init__(self, content: bytes) -> None:
        need('ai_edge_litert')
        from ai_edge_litert.interpreter import Interpreter

        try:
            self._interpreter = Interpreter(
                model_content=content, num_threads=1
            )
            self._interpreter.allocate_tensors()
            self._run = self._interpreter.get_signature_runner()
        except (ValueError, RuntimeError) as error:
            raise UsageError(
                f'ai-edge-litert {version("ai-edge-litert")} refuses the '
                f'file ({one_line(error)})'
            ) from error

    def run(
        self, names: Sequence[str], feed: dict[str, np.ndarray]
    ) -> list[np.ndarray]:
        """Outputs by name, (N, ...), with the axes of PyTorch."""
        found = [self._run(**{INPUT: image[None]}) for image in feed[INPUT]]
        values = [np.concatenate([one[n] for one in found]) for n in names]
        return [np.moveaxis(v, -1, 1) if v.ndim == 4 else v for v in values]
