"""Data sets that need no download, and small ones held in memory."""

from .digits import Digits
from .generated import GeneratedImages
from .held_out import HeldOut
from .in_memory import InMemoryImages, collated
from .stacked_batch import stacked_batch
from .tiny_imagenet import TinyImageNet

__all__ = [
    'Digits',
    'GeneratedImages',
    'HeldOut',
    'InMemoryImages',
    'TinyImageNet',
    'collated',
    'stacked_batch',
]
