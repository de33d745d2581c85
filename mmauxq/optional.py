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


def is_installed(name: str) -> bool:
    """Whether there is a package, and not only a folder of that name."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def need(*packages: str) -> None:
    """Check keys of :data:`INSTALL`, before work is done that would be lost.

    Raises:
        UsageError: If one is missing, with what installs it.
    """
    for name in packages:
        if not is_installed(name):
            raise UsageError(
                f'this needs the package {name}, which is not installed: '
                f'pip install {INSTALL[name]}'
            )
