"""What all quantizers share: bits, role, and the state of calibration."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from mmengine import dist
from torch import Tensor, nn

from mmauxq.errors import TrainingError, UsageError

from .functional import MIN_SCALE

FLOAT_BITS = 32
"""The width that means "leave it in floating point"."""

ROLES = ('weight', 'activation')


MOST_BITS = dict(weight=8, activation=16)
"""Widest integers of a role; float32 holds all codes of 16 bits."""


def check_bits(bits: object, where: str, role: str = 'weight') -> int:
    """``bits``, or a UsageError if they are no width of an operand."""
    most = MOST_BITS[role]
    if type(bits) is not int or bits not in (*range(1, most + 1), FLOAT_BITS):
        raise UsageError(
            f'{where}: expected bits from 1 to {most}, or {FLOAT_BITS} for '
            f'floating point, got bits={bits!r}'
        )
    return bits


def flag(value: bool) -> Tensor:
    """A yes or no for a buffer."""
    # MMEngine's SyncBuffersHook averages over ranks, which no bool allows
    return torch.tensor(value, dtype=torch.uint8)


def over_ranks(x: Tensor, op: str) -> Tensor:
    """The mean, min or max (``op``) of ``x`` over all ranks, elementwise,
    equal to the bit on each."""
    if dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x, op=op)
    return x


@dataclass(frozen=True)
class Grid:
    """The integer form of a quantizer: ``value = code * scale + offset``.

    Codes are the integers ``qmin, qmin + stride, ..., qmax``. The stride is 1
    except for DoReFa's weights, which lie at odd multiples of ``1 / n``: no
    integer is the code of zero.

    Args:
        scale: Positive, shape (1,) or (number of channels,).
        offset: Value of code 0, same shape; ``None`` for zero.
    """

    scale: Tensor
    offset: Tensor | None
    qmin: int
    qmax: int
    stride: int = 1


class Quantizer(nn.Module):
    """Maps a tensor to at most ``2**bits`` values, with a gradient.

    State is created in the constructor, so that DDP and the optimizer see it.
    Its values come from :meth:`calibrate`, before training, and travel with
    the state dict. Subclasses implement :meth:`quantize`, and
    :meth:`set_scales` if they have something to learn from data.

    Attributes:
        scale: Name of the learned scale, a parameter that is always positive;
            ``None`` if there is none.
        sample_size: Number of values of one sample, for activations whose
            axis 0 does not hold the samples (windows of a Swin Transformer);
            ``None`` if it does.

    Args:
        bits: Width in bits, 1 to 8, for activations to 16; 32 leaves the
            tensor as it is.
        role: ``'weight'`` (axis 0 holds the output channels) or
            ``'activation'`` (axis 0 holds the samples), the default of a
            quantizer that serves both.
        num_channels: Number of channels that have a scale each; ``None`` for
            a single scale.
        channel_axis: Axis of the channels, used with ``num_channels``; by
            default 0 for weights and 1 for activations.

    Raises:
        UsageError: If an argument is out of its range, and in
            :meth:`forward` if the quantizer was never calibrated.
    """

    needs_calibration = True
    scale: str | None = None
    roles: tuple[str, ...] = ROLES
    calibrated: Tensor

    def __init__(
        self,
        bits: int,
        role: str | None = None,
        num_channels: int | None = None,
        channel_axis: int | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        role = self.roles[-1] if role is None else role
        if role not in self.roles:
            raise UsageError(
                f'{name}: expected a role out of {list(self.roles)}, got '
                f'{role!r}'
            )
        self.bits = check_bits(bits, name, role)
        self.role = role
        self.num_channels = num_channels
        if channel_axis is None:
            channel_axis = int(role == 'activation')
        self.channel_axis = channel_axis
        self.sample_size: int | None = None
        if self.scale is not None:
            setattr(self, self.scale, self.new_parameter(1.0))
        self.register_buffer('calibrated', flag(not self.needs_calibration))
        # The buffer lives on the device; reading it would stall every step.
        self._ready = not self.needs_calibration
        self.create_state()

    def create_state(self) -> None:
        """Create parameters and buffers beside the scale."""

    def new_parameter(self, value: float) -> nn.Parameter:
        """One value for each scale; at 32 bits it is not trained."""
        values = torch.full((self.num_channels or 1,), value)
        return nn.Parameter(values, self.bits != FLOAT_BITS)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized tensor, in the shape and dtype of ``x``."""
        if self.bits == FLOAT_BITS:
            return x
        if not self._ready:
            self._read_buffers()
        if not self._ready:
            raise UsageError(
                f'{type(self).__name__}: was never calibrated; train it, or '
                'load a checkpoint of a trained quantized network'
            )
        return self.quantize(x)

    def quantize(self, x: Tensor) -> Tensor:
        """:meth:`forward` of a calibrated quantizer below 32 bits."""
        raise NotImplementedError

    def grid(self) -> Grid:
        """The integer form, for a calibrated quantizer of less than 32 bits,
        or a UsageError if there is none."""
        raise UsageError(
            f'{type(self).__name__}: has no integer form at {self.bits} bits'
        )

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The integer codes (int32) of the quantized ``x``."""
        # of the quantized values, so that export rounds as training does
        return self.in_steps(self(x)).round().int()

    def in_steps(self, x: Tensor) -> Tensor:
        """``(x - offset) / scale``, float64: codes if ``x`` is quantized."""
        grid, value = self.grid(), x.double()
        if grid.offset is not None:
            value = value - self.broadcast(grid.offset, x).double()
        return value / self.broadcast(grid.scale, x).double()

    def weight_of(self, codes: Tensor) -> Tensor:
        """A tensor that the quantizer maps to these codes, to the bit."""
        grid = self.grid()
        value = codes * self.broadcast(grid.scale, codes)
        if grid.offset is not None:
            value = value + self.broadcast(grid.offset, codes)
        return value

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the learned state from a tensor, equally on all ranks; a
        TrainingError if it has NaN or infinity."""
        self.set_scales(x.detach().float())
        if not all(bool(p.isfinite().all()) for p in self.parameters()):
            raise TrainingError(
                f'{type(self).__name__}: expected finite values to calibrate '
                'with, got NaN or infinity'
            )
        self.calibrated.fill_(1)
        self._read_buffers()

    def set_scales(self, x: Tensor) -> None:
        """Compute the learned state from ``x``, float32."""

    def _read_buffers(self) -> None:
        """Copy what buffers say into plain attributes."""
        self._ready = bool(self.calibrated)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_buffers()

    def rows(self, x: Tensor) -> Tensor:
        """``x`` as (number of scales, values that share one)."""
        if self.num_channels is None:
            return x.reshape(1, -1)
        return x.movedim(self.channel_axis, 0).reshape(self.num_channels, -1)

    def broadcast(self, scale: Tensor, x: Tensor) -> Tensor:
        """A scale, (1,) or (C,), in a shape that broadcasts to ``x``."""
        if self.num_channels is None:
            # a 0-dim operand keeps the fast elementwise kernels
            return scale.reshape(())
        shape = [1] * x.dim()
        shape[self.channel_axis] = -1
        return scale.reshape(shape)

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        shown = f'bits={self.bits}, role={self.role!r}'
        if self.num_channels is not None:
            shown += f', num_channels={self.num_channels}'
        return shown


def scales_of(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of all quantizers, which are known by their names."""
    quantizers = {'weight_quantizer', 'input_quantizer'}
    return {
        parameter
        for name, parameter in model.named_parameters()
        if not quantizers.isdisjoint(name.split('.'))
    }


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(name, quantizer) of all quantizers in ``model`` below 32 bits."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and module.bits != FLOAT_BITS:
            yield name, module


def learned_scales(model: nn.Module) -> list[Tensor]:
    """The scales of all quantizers that learn one."""
    return [
        getattr(quantizer, quantizer.scale)
        for _, quantizer in named_quantizers(model)
        if quantizer.scale is not None
    ]


@torch.no_grad()
def keep_positive(scales: list[Tensor]) -> None:
    """Set scales that an optimizer moved to zero or below to the least
    positive one, which stands for them in any case."""
    if scales:
        torch._foreach_clamp_min_(scales, MIN_SCALE)  # one launch
