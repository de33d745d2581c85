"""Recipes by seeds, trained on equal terms."""

from .statistics import PairedDifference, paired_difference

__all__ = ['PairedDifference', 'paired_difference']
