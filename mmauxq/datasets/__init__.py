"""Data sets that need no download."""

from .digits import Digits
from .generated import GeneratedImages

__all__ = ['Digits', 'GeneratedImages']
