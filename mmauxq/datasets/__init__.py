"""Data sets that need no download."""

from .digits import Digits

__all__ = ['Digits']
