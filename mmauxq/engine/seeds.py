"""Random numbers that depend on the step alone."""

import hashlib
import random

import numpy as np
import torch


def seed_step(seed: int, step: int, what: str = 'train') -> None:
    """Seed Python, NumPy and torch for one training step.

    The random numbers of a step are then a function of the run's seed and of
    the step, so that a resumed run draws what the unbroken one drew, on
    every rank, with no state in the checkpoint.

    Args:
        seed: Of the run (and of the rank, if ranks differ).
        step: From 0.
        what: Keeps apart what happens at the same step, such as validation.
    """
    digest = hashlib.blake2b(f'{seed}/{what}/{step}'.encode(), digest_size=8)
    value = int.from_bytes(digest.digest(), 'big')
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value % 2**63)
