"""Running a network without leaving a trace."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmauxq.quantizers import Quantizer
from mmauxq.restoring import gpu_generators, snapshot, snapshot_generators


@contextmanager
def forked_generators(*modules: nn.Module) -> Iterator[None]:
    """Restore, afterwards, the random number generators of Python, of NumPy
    and of torch, on the CPU and on each GPU that ``modules`` are on."""
    with ExitStack() as stack:
        stack.callback(snapshot_generators(*modules))
        yield


@contextmanager
def restoring(*modules: nn.Module) -> Iterator[None]:
    """Restore, afterwards, the modes of ``modules``, the values of all buffers
    except those of quantizers, and the generators of random numbers."""
    with ExitStack() as stack:
        stack.callback(snapshot(*modules, without=Quantizer))
        yield


@contextmanager
def probing(*modules: nn.Module, training: bool = False) -> Iterator[None]:
    """:func:`restoring`, with modes, gradients and random numbers set.

    Torch's generators start from 0. Warnings are not shown: they come again
    when training starts. The modules are in evaluation mode without gradients;
    with ``training`` their backbones are in training mode with gradients, but
    not batch norms, because a single sample has no statistics, nor heads,
    because some run only inside of their loss.
    """
    with (
        restoring(*modules),
        torch.set_grad_enabled(training),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter('ignore')
        for module in modules:
            module.eval()
            if training:
                for inner in module.backbone.modules():
                    inner.training = not isinstance(inner, _BatchNorm)
        seed_generators(*modules)
        yield


def seed_generators(*modules: nn.Module, seed: int = 0) -> None:
    """Seed torch's generators of the CPU and of the GPUs of ``modules``, not,
    like ``torch.manual_seed``, of all GPUs."""
    torch.default_generator.manual_seed(seed)
    for generator in gpu_generators(modules):
        generator.manual_seed(seed)


def sample_images(
    model: nn.Module, shape: Sequence[int], count: int = 1
) -> Tensor:
    """Random images (count, C, H, W) on the device of ``model``, always the
    same ones."""
    parameter = next(model.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *shape, generator=generator).to(parameter.device)
