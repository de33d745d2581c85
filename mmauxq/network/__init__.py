"""What a pass tells of an architecture, and which state dicts fit it."""

from .probing import (
    forked_generators,
    probing,
    restoring,
    sample_images,
    seed_generators,
)
from .profile import NetworkProfile, profile
from .training_pass import TrainingPass

__all__ = [
    'NetworkProfile',
    'TrainingPass',
    'forked_generators',
    'probing',
    'profile',
    'restoring',
    'sample_images',
    'seed_generators',
]
