"""From a training checkpoint to what ships."""

from .packed import load_packed, save_packed
from .slim import save_slim

__all__ = ['load_packed', 'save_packed', 'save_slim']
