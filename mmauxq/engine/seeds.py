"""Random numbers that depend on the step alone."""

import hashlib
import random

import numpy as np
import torch


def seed_step(seed: int, step: int, what: str = 'train') -> None:
    """Seed Python, NumPy and torch (on the device in use) for a step.

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
    # not torch.manual_seed: for kinds of devices that are not there it notes
    # the seed together with the stack, in every step
    torch.default_generator.manual_seed(value % 2**63)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value % 2**63)
