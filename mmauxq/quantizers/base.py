"""What all quantizers share: bits, role, and the state of calibration."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from mmengine import dist
from torch import Tensor, nn

from mmauxq import ops
from mmauxq.errors import TrainingError, UsageError

from .grid import Grid

FLOAT_BITS = 32
"""The width that means "leave it in floating point"."""


def check_bits(bits: object, lowest: int, where: str) -> int:
    """``bits`` if it is a width that ``where`` can have.

    Raises:
        UsageError: If it is neither ``lowest`` to 8 nor 32.
    """
    if (
        isinstance(bits, bool)
        or not isinstance(bits, int)
        or not (lowest <= bits <= 8 or bits == FLOAT_BITS)
    ):
        raise UsageError(
            f'{where}: bits={bits!r}; allowed are {lowest} to 8, '
            f'and {FLOAT_BITS} for floating point'
        )
    return bits


def flag(value: bool) -> Tensor:
    """A yes or no for a buffer.

    Not of type bool: MMEngine's SyncBuffersHook averages buffers over ranks,
    which neither gloo nor NCCL can do with bool.
    """
    return torch.tensor(value, dtype=torch.uint8)


@dataclass
class LearnedStep:
    """What :func:`mmauxq.ops.learned_step_quantize` needs beside its input.

    Args:
        step: Distance of the levels, shape (1,) or (channels,).
        offset: Value of code 0, same shape; ``None`` for 0.
        qmin: Lowest code.
        qmax: Highest code.
        grad_scale: Factor on the gradients of step and offset.
    """

    step: Tensor
    offset: Tensor | None
    qmin: int
    qmax: int
    grad_scale: float


class Quantizer(nn.Module):
    """Maps a tensor to at most ``2**bits`` values, with a gradient.

    State is created in the constructor, so that DDP and the optimizer see it;
    its values come from the first batch that is run inside
    :func:`calibrating`, and are the same on all ranks. The buffer
    ``calibrated`` travels with the state dict: a resumed or evaluated
    quantizer is never calibrated again.

    Subclasses implement :meth:`learned_step` or :meth:`quantize`, and
    :meth:`calibrate` if they have something to learn from data.

    Attributes:
        scale: Name of the learned scale, a parameter that is always positive;
            ``None`` if there is none.
        given: A tensor and what :meth:`forward` returns for it, when that was
            computed together with the results of other quantizers.

    Args:
        bits: Width in bits, 1 to 8; 32 leaves the tensor as it is.
        role: ``'weight'`` (axis 0 holds the output channels) or
            ``'activation'`` (axis 0 holds the samples).
        num_channels: One scale for each of so many channels; ``None`` for
            one scale in all.
        channel_axis: Axis of the channels, used with ``num_channels``.

    Raises:
        UsageError: If an argument is out of its range, and in
            :meth:`forward` if the quantizer was never calibrated.
    """

    needs_calibration = True
    scale: str | None = None
    lowest_bits = 1
    roles: tuple[str, ...] = ('weight', 'activation')
    calibrated: Tensor

    def __init__(
        self,
        bits: int,
        role: str = 'activation',
        num_channels: int | None = None,
        channel_axis: int = 0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.bits = check_bits(bits, self.lowest_bits, name)
        if role not in self.roles:
            raise UsageError(
                f'{name}: role={role!r}; allowed are {list(self.roles)}'
            )
        self.role = role
        self.num_channels = num_channels
        self.channel_axis = channel_axis
        self.calibrating = False
        self.given: tuple[Tensor, Tensor] | None = None
        self.register_buffer('calibrated', flag(not self.needs_calibration))
        # The buffer lives on the device; asking it would stall every step.
        self._ready = not self.needs_calibration

    def forward(self, x: Tensor) -> Tensor:
        """The quantized tensor, in the shape and dtype of ``x``."""
        if self.bits == FLOAT_BITS:
            return x
        if self.given is not None and x is self.given[0]:
            return self.given[1]
        if not self._ready:
            self._get_ready(x)
        return self.quantize(x)

    def quantize(self, x: Tensor) -> Tensor:
        """The op itself; see the class for what is known of ``x``."""
        how = self.learned_step(x)
        if how is None:
            raise NotImplementedError
        return ops.learned_step_quantize(
            x,
            self._spread(ops.lower_bound(how.step), x),
            how.qmin,
            how.qmax,
            None if how.offset is None else self._spread(how.offset, x),
            how.grad_scale,
        )

    def learned_step(self, x: Tensor) -> LearnedStep | None:
        """How ``x`` is quantized, if :meth:`quantize` is that op."""
        return None

    def grid(self) -> Grid:
        """The integer form, for a calibrated quantizer of less than 32 bits.

        Raises:
            UsageError: If there is none.
        """
        raise UsageError(
            f'{type(self).__name__}: has no integer form at {self.bits} bits'
        )

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The integer codes (int32) of what the quantizer gives for ``x``.

        They are read off the quantized values, so that there is one rounding
        rule for training, evaluation and export.
        """
        grid = self.grid()
        value = self(x).double()
        if grid.offset is not None:
            value = value - self._spread(grid.offset, x).double()
        return (value / self._spread(grid.scale, x).double()).round().int()

    def weight_of(self, codes: Tensor) -> Tensor:
        """A tensor that the quantizer maps to these codes, to the bit."""
        grid = self.grid()
        value = codes * self._spread(grid.scale, codes)
        if grid.offset is not None:
            value = value + self._spread(grid.offset, codes)
        return value

    def calibrate(self, x: Tensor) -> None:
        """Set the learned state from ``x``, equally on all ranks."""

    def _get_ready(self, x: Tensor) -> None:
        if not bool(self.calibrated):
            if not self.calibrating:
                raise UsageError(
                    f'{type(self).__name__}: was never calibrated; train it, '
                    'or load a checkpoint of a trained quantized network'
                )
            with torch.no_grad():
                self.calibrate(x.detach().float())
                finite = [bool(p.isfinite().all()) for p in self.parameters()]
            if not all(finite):
                raise TrainingError(
                    f'{type(self).__name__}: the first batch gives it NaN or '
                    'infinity, from which no scale can be found'
                )
            self.calibrated.fill_(1)
        self._ready = True
        self._restore()

    def _restore(self) -> None:
        """Read what buffers say into plain attributes."""

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = bool(self.calibrated)
        if self._ready:
            self._restore()

    def _per_scale(self, x: Tensor) -> Tensor:
        """``x`` as (number of scales, values that share one)."""
        if self.num_channels is None:
            return x.reshape(1, -1)
        return x.movedim(self.channel_axis, 0).reshape(self.num_channels, -1)

    def _spread(self, scale: Tensor, x: Tensor) -> Tensor:
        """A scale of shape (1,) or (C,) so that it broadcasts to ``x``."""
        if self.num_channels is None:
            # a 0-dim operand keeps the fast elementwise kernels
            return scale.reshape(())
        shape = [1] * x.dim()
        shape[self.channel_axis] = -1
        return scale.reshape(shape)

    def _values_per_scale(self, x: Tensor) -> int:
        """N of the LSQ gradient scale.

        Weights: those that share a step. Activations: the features of one
        sample that share a step, whatever the batch size.
        """
        count = x.numel() // (self.num_channels or 1)
        if self.role == 'activation' and x.dim() > 1:
            count //= x.shape[0]
        return max(count, 1)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        scales = (
            ''
            if self.num_channels is None
            else (f', num_channels={self.num_channels}')
        )
        return f'bits={self.bits}, role={self.role!r}{scales}'


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a statistic over all ranks, bit-equal on each."""
    if dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x, op='mean')
    return x


def extreme_over_ranks(x: Tensor, op: str) -> Tensor:
    """The ``'min'`` or ``'max'`` of a statistic over all ranks."""
    if dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x, op=op)
    return x


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(name, quantizer) of all quantizers in ``model`` that do quantize."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and module.bits != FLOAT_BITS:
            yield name, module


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """While active, quantizers in ``model`` not yet calibrated become so.

    Each takes the first tensor that reaches it, with the layers before it
    already quantized. All ranks must run the same layers in the same order.
    """
    quantizers = [q for _, q in named_quantizers(model)]
    for quantizer in quantizers:
        quantizer.calibrating = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.calibrating = False
