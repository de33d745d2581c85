"""From a training checkpoint to what ships; needs torch alone.

What needs ONNX is in :mod:`mmauxq.deploy.onnx`, imported by the commands that
export, audit and time.
"""

from .packed import load_packed, save_packed
from .slim import save_slim

__all__ = ['load_packed', 'save_packed', 'save_slim']
