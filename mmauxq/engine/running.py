"""Small helpers of the hooks and loops."""

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import BaseOptimWrapper, OptimWrapperDict
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.optim import Optimizer

from mmauxq.batch_samples import BatchSamples
from mmauxq.errors import UsageError


def bare_model(runner: Any) -> nn.Module:
    """The model of a runner, without DDP's wrapper."""
    model = runner.model
    return model.module if is_model_wrapper(model) else model


def only_optimizer(runner: Any, asks: str) -> Optimizer | None:
    """The optimizer of a runner, built; ``None`` if it does not train.

    Args:
        runner: Of MMEngine.
        asks: Who wants to know, for messages.

    Raises:
        UsageError: If there are several.
    """
    wrapper = runner.optim_wrapper
    if not isinstance(wrapper, BaseOptimWrapper):
        return None
    if isinstance(wrapper, OptimWrapperDict):
        raise UsageError(
            f'{asks}: expected an optim_wrapper of one optimizer, got one of '
            f'{len(wrapper)}'
        )
    return wrapper.optimizer


def end_loaders(runner: Any) -> None:
    """End the processes of the data loaders of a runner.

    PyTorch waits for each of them for five seconds as the interpreter ends,
    where they persist and there is a GPU to pin memory for.
    """
    loops = runner._train_loop, runner._val_loop, runner._test_loop
    for loader in (getattr(loop, 'dataloader', None) for loop in loops):
        iterator = getattr(loader, '_iterator', None)
        if hasattr(iterator, '_shutdown_workers'):
            loader._iterator = None
            iterator._shutdown_workers()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, dicts and data samples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, BatchSamples):
        yield from () if value.targets is None else (value.targets,)
    elif isinstance(value, (dict, BaseDataElement)):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            if isinstance(inner, Tensor):  # one generator for many images
                yield inner
            else:
                yield from tensors_in(inner)


def seed_step(seed: int, step: int, what: str = 'train') -> None:
    """Seed Python, NumPy and torch (on the device in use) for a step.

    A resumed run then draws what the unbroken one drew, on every rank, with
    no state in the checkpoint.

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
