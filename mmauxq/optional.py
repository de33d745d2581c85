"""Packages that only some commands need."""

import importlib.util

from .errors import UsageError

INSTALL = {
    'ai_edge_litert': '"mmauxq[tflite]"',
    'litert_torch': '"mmauxq[tflite]"',
    'matplotlib': '"mmauxq[compare]"',
    'onnx': '"mmauxq[export]"',
    'onnxruntime': '"mmauxq[export]"',
    'onnxscript': '"mmauxq[export]"',
    'openvino': 'openvino',
    'qonnx': '"mmauxq[qonnx]"',
    'rich': '"mmauxq[compare]"',
    'safetensors': '"mmauxq[export]"',
    'scipy': '"mmauxq[compare]"',
    'sklearn': '"mmauxq[digits]"',
}
"""Import name -> what to give to ``pip install``.

No index has MMAuxQ, but pip adds an extra to what is installed already.
"""


def need(*packages: str) -> None:
    """Check keys of :data:`INSTALL`, before work is done that would be lost.

    Raises:
        UsageError: If one is missing, with what installs it.
    """
    for name in packages:
        found = importlib.util.find_spec(name)
        # a folder of the user's with that name has no origin
        if found is None or found.origin is None:
            raise UsageError(
                f'this needs the package {name}, which is not installed: '
                f'pip install {INSTALL[name]}'
            )
