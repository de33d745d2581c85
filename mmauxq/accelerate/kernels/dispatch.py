"""Which implementation of an op runs: its definition, or a Triton kernel."""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmauxq.errors import check_choice
from mmauxq.optional import is_installed

FORMS = ('auto', 'reference', 'kernel')
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_form = os.environ.get('MMAUXQ_OPS', 'auto')
check_choice('MMAUXQ_OPS', _form, FORMS)
_kept: list[Tensor] | None = None


@contextmanager
def use_form(form: str) -> Iterator[None]:
    """Choose the implementation of the ops, for tests and measurements: one of
    :data:`FORMS`, else a ValueError.

    ``'auto'`` takes kernels for CUDA tensors in eager mode. Compiled code
    takes the definition, whose backward pass the compiler fuses with its
    neighbours; it cannot fuse a Triton kernel. ``'kernel'`` takes kernels also
    there, and on the CPU in Triton's interpreter. The environment variable
    ``MMAUXQ_OPS`` sets the form at the start of a process.
    """
    global _form
    if form not in FORMS:
        raise ValueError(f'form: expected one of {list(FORMS)}, got {form!r}')
    before, _form = _form, form
    try:
        yield
    finally:
        _form = before


@contextmanager
def keep_alive() -> Iterator[list[Tensor]]:
    """While entered, collects in a list, which is for the owner of the
    recording to hold, tensors that a CUDA graph will read again."""
    global _kept
    before, _kept = _kept, []
    try:
        yield _kept
    finally:
        _kept = before


def keep(*tensors: Tensor) -> None:
    """Keep tensors as long as the recording that is being captured."""
    if _kept is not None:
        _kept.extend(tensors)


def product_dtype(x: Tensor) -> torch.dtype:
    """In which dtype a convolution of ``x`` is computed."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def wants_kernel(x: Tensor) -> bool:
    """Whether a kernel should run for ``x``, if there is one that can."""
    if _form == 'auto':
        return x.is_cuda and not torch.compiler.is_compiling() and has_triton()
    return _form == 'kernel'


def is_forced() -> bool:
    """Whether kernels were asked for by name."""
    return _form == 'kernel'


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; logged once if it is not."""
    found = is_installed('triton')
    if not found:
        fall_back('Triton is not installed')
    return found


@functools.cache
def fall_back(reason: str) -> None:
    """Log once in a process why a kernel does not run."""
    logging.getLogger('mmauxq').warning(
        'mmauxq: the definition runs instead of a kernel: %s', reason
    )


def runs_triton(x: Tensor) -> bool:
    """Whether Triton can read ``x``: on a GPU, or in its interpreter."""
    interpreted = os.environ.get('TRITON_INTERPRET', '0') not in ('', '0')
    return (x.is_cuda or interpreted) and has_triton()


def is_dense(x: Tensor) -> bool:
    """Whether the elements of ``x`` fill a stretch of memory, in any order."""
    if x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    ):
        return True
    axes = sorted(range(x.dim()), key=lambda i: x.stride(i), reverse=True)
    return x.permute(axes).is_contiguous()
