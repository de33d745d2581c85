"""From a training checkpoint to what ships."""

from .slim import save_slim

__all__ = ['save_slim']
