"""Undoing what running a network leaves: modes, buffers, random numbers."""

import random
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn


def snapshot(
    *modules: nn.Module, without: type[nn.Module] | tuple = ()
) -> Callable[[], None]:
    """Keep the modes and buffers of modules, and the generators.

    Args:
        modules: With all that is in them.
        without: Classes of modules whose buffers are not kept, nor those of
            what is in them.

    Returns:
        A function that sets all of them back.
    """
    inner = [m for module in modules for m in module.modules()]
    modes = [(module, module.training) for module in inner]
    left = {i for m in inner if isinstance(m, without) for i in m.modules()}
    buffers = [
        (buffer, buffer.clone())
        for module in inner
        if module not in left
        for buffer in module.buffers(recurse=False)
    ]
    restore_generators = snapshot_generators(*modules)

    def restore() -> None:
        restore_generators()
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

    return restore


def snapshot_generators(*modules: nn.Module) -> Callable[[], None]:
    """Keep the state of the generators of random numbers.

    Args:
        modules: On whose GPUs the generators of torch are kept, beside those
            of torch on the CPU, of NumPy and of Python.

    Returns:
        A function that sets the state back.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = [(g, g.get_state()) for g in gpu_generators(modules)]

    def restore() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for generator, state in gpus:
            generator.set_state(state)

    return restore


def gpu_generators(modules: Iterable[nn.Module]) -> list[torch.Generator]:
    """Torch's default generator of each GPU that ``modules`` are on."""
    indices = {
        p.device.index for m in modules for p in m.parameters() if p.is_cuda
    }
    return [torch.cuda.default_generators[i] for i in sorted(indices)]


def host_state() -> tuple:
    """State of the host's generators, to be compared."""
    name, keys, *rest = np.random.get_state()  # type: ignore[misc]
    return (
        random.getstate(),
        (name, keys.tobytes(), *rest),
        torch.get_rng_state().numpy().tobytes(),
    )
