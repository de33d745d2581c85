"""From a training checkpoint to what ships; needs torch alone.

What needs ONNX is in :mod:`mmauxq.deploy.onnx`, imported by the commands that
export, audit and time.
"""

from .packed import fill_packed, write_packed
from .slim import slim_checkpoint

__all__ = ['fill_packed', 'write_packed', 'slim_checkpoint']
