"""Launches of the kernels of :mod:`.fusion_kernels`, and what they write.

Like these kernels, not a part of the package.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmauxq.accelerate.kernels.norm import BatchNorm
from mmauxq.accelerate.kernels.tiles import (
    launch,
    multiprocessors,
    power_of_two,
    tiles,
)

from . import fusion_kernels

EPS, MOMENTUM = 1e-5, 0.1
FRONT = {
    name: getattr(fusion_kernels, name).value
    for name in ('PLAIN', 'NORM', 'NORM_MASK')
}
BEHIND = {
    name: getattr(fusion_kernels, name).value
    for name in ('NOTHING', 'QUANTIZE', 'NORM_QUANTIZE', 'SUM_QUANTIZE')
}
H200_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Shape:
    """A 1x1 convolution of (batch, inputs, height, width), channels last."""

    batch: int
    inputs: int
    outputs: int
    height: int
    width: int
    stride: int = 1

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        return -(-self.height // self.stride), -(-self.width // self.stride)

    @property
    def rows(self) -> int:
        """Pixels of the output of the whole batch."""
        return self.batch * self.out_size[0] * self.out_size[1]

    @property
    def in_rows(self) -> int:
        """Pixels of the input of the whole batch."""
        return self.batch * self.height * self.width


@dataclass(frozen=True)
class Config:
    """How a kernel divides its work: the tile of a program, ROWS x COLUMNS, of
    which DEPTH products are summed at a time; programs of a multiprocessor;
    the most registers of a thread."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 2
    registers: int | None = None

    def flags(self) -> dict[str, int | None]:
        """What a kernel is told."""
        return dict(
            ROWS=self.rows, COLUMNS=self.columns, DEPTH=self.depth,
            STAGES=self.stages, num_warps=self.warps, num_stages=self.stages,
            maxnreg=self.registers,
        )  # fmt: skip


@dataclass
class Launch:
    """A kernel of :mod:`.fusion_kernels` and all that it is given."""

    kernel: str
    programs: int
    args: tuple
    how: dict[str, Any]

    def __call__(self) -> None:
        kernel = getattr(fusion_kernels, self.kernel)
        launch(kernel, self.args[0], self.programs, *self.args, **self.how)

    def spec(self) -> tuple:
        """The same with the dtypes of tensors instead of them."""
        args = [a.dtype if isinstance(a, Tensor) else a for a in self.args]
        how = tuple(sorted({'enable_fp_fusion': False, **self.how}.items()))
        return self.kernel, tuple(args), how


@dataclass
class Fused:
    """What runs, in this order, and the tensors that it writes."""

    steps: list[Callable[[], Any]]
    out: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self) -> None:
        for step in self.steps:
            step()

    def specs(self) -> list[tuple]:
        """Of its launches."""
        return [s.spec() for s in self.steps if isinstance(s, Launch)]


def _split(
    rows: int, height: int, tiles: int, programs: int, device: torch.device
) -> tuple[int, int]:
    """Blocks of ``height`` rows that a program goes through, and programs of
    each tile; blocks that all exist if ``height`` divides ``rows``."""
    if device.type == 'meta':
        at_once = programs * H200_MULTIPROCESSORS
    else:
        at_once = programs * multiprocessors(device)
    blocks = -(-rows // height)
    repeats = -(-blocks // max(1, min(blocks, at_once // tiles)))
    while rows % height == 0 and blocks % repeats:
        repeats += 1
    return repeats, -(-blocks // repeats)


def _even(rows: int, *pairs: tuple[int, int]) -> bool:
    return rows == 0 and all(size % block == 0 for size, block in pairs)


def _map(like: Tensor, batch: int, channels: int, size: tuple) -> Tensor:
    """An empty feature map, channels last."""
    return torch.empty(
        (batch, channels, *size), dtype=like.dtype, device=like.device,
        memory_format=torch.channels_last,
    )  # fmt: skip


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def product(
    shape: Shape, config: Config, q: Tensor, step: Tensor, w: Tensor,
    running: tuple[Tensor, Tensor], qmin: int = 0,
) -> Fused:  # fmt: skip
    """The convolution of the values ``q``, or of their codes above ``qmin`` in
    uint8, with the statistics of its output.

    Args:
        q: (N, inputs, H, W), channels last.
        step: Of the quantizer, one element, float32.
        w: Quantized weight (outputs, inputs, 1, 1), in the dtype of ``z``.
        running: Mean and variance, (outputs,), updated in place.

    Returns:
        Writes ``z``, ``mean`` and ``rstd``.
    """
    n, k, rows = shape.outputs, shape.inputs, shape.rows
    columns = -(-n // config.columns)
    repeats, splits = _split(
        rows, config.rows, columns, config.programs, q.device
    )
    z = _map(w, shape.batch, n, shape.out_size)
    partial = _floats(w, 2, splits, n)
    mean, rstd = _floats(w, 2, n)
    even = _even(rows % config.rows, (n, config.columns), (k, config.depth))
    main = Launch(
        'forward_kernel', columns * splits,
        (q, step, w, z, partial, rows, n, splits, shape.height, shape.width),
        dict(K=k, QMIN=qmin, CODES=q.dtype == torch.uint8, EVEN=even,
             STRIDE=shape.stride, REPEATS=repeats, **config.flags()),
    )  # fmt: skip
    return Fused(
        [main, _finish(partial, mean, rstd, running, rows, repeats, config)],
        dict(z=z, mean=mean, rstd=rstd),
    )


def _finish(
    partial: Tensor, mean: Tensor, rstd: Tensor,
    running: tuple[Tensor, Tensor], rows: int, repeats: int, config: Config,
) -> Launch:  # fmt: skip
    _, splits, n = partial.shape
    width = min(power_of_two(n), 16)
    return Launch(
        'finish_kernel', -(-n // width),
        (partial, mean, rstd, *running, rows, n, splits,
         repeats * config.rows, EPS, MOMENTUM),
        dict(CHANNELS=width, SPLITS=min(power_of_two(splits), 128),
             num_warps=4),
    )  # fmt: skip


def normalised_codes(
    z: Tensor, norm: BatchNorm, identity: Tensor | None, step: Tensor,
    qmin: int, qmax: int,
) -> Fused:  # fmt: skip
    """Batch norm, sum, ReLU and quantizer; writes ``codes`` above ``qmin``,
    and ``x``, the rectified sum, if there is an ``identity``."""
    blocks, columns, how = tiles(z, 1, (4096, 128))
    codes = torch.empty_like(z, dtype=torch.uint8)
    x = z if identity is None else torch.empty_like(z)
    run = Launch(
        'codes_kernel', blocks * columns,
        (z, z if identity is None else identity, norm.mean, norm.rstd,
         norm.weight, norm.bias, step, x, codes),
        dict(QMIN=qmin, QMAX=qmax, IDENTITY=identity is not None,
             num_warps=4, **how),
    )  # fmt: skip
    return Fused([run], dict(codes=codes, x=x))


def quantized_codes(
    x: Tensor, step: Tensor, qmin: int, qmax: int
) -> Fused:  # fmt: skip
    """The quantizer alone; writes ``codes`` above ``qmin``."""
    block = 2048
    codes = torch.empty_like(x, dtype=torch.uint8)
    run = Launch(
        'pack_kernel', -(-x.numel() // block),
        (x, step, step, codes, x.numel()),
        dict(QMIN=qmin, QMAX=qmax, OFFSET=False, WIDE=False, EACH=1,
             BLOCK=block, num_warps=8),
    )  # fmt: skip
    return Fused([run], dict(codes=codes))


@dataclass
class After:
    """What follows the convolution, in the backward pass.

    Args:
        grad: Of the batch norm's result, masked already; with ``step`` of the
            result of the quantizer behind it and a ReLU. Without ``norm`` of
            the convolution's output.
        z: Output of the convolution.
        norm: The batch norm.
        sums: Of the gradient, and of it times the normalised ``z``,
            (2 or 3, outputs), float32.
        step: Of the quantizer, one element.
    """

    grad: Tensor
    z: Tensor | None = None
    norm: BatchNorm | None = None
    sums: Tensor | None = None
    step: Tensor | None = None

    def front(self) -> int:
        """What the kernels do in front of the product."""
        if self.norm is None:
            return FRONT['PLAIN']
        return FRONT['NORM' if self.step is None else 'NORM_MASK']

    def args(self) -> tuple:
        """For the kernels."""
        norm = self.norm
        if norm is None:
            return (self.grad,) * 8
        step = norm.mean if self.step is None else self.step
        return (
            self.grad, self.z, norm.mean, norm.rstd, norm.weight, norm.bias,
            step, self.sums,
        )  # fmt: skip


@dataclass
class Before:
    """What made the input of the convolution, in the forward pass.

    Args:
        kind: A key of :data:`BEHIND`.
        step: Of the quantizer, one element.
        x: What was quantized, unless the kind is ``NORM_QUANTIZE``.
        z: Input of the batch norm before it, with ``norm``.
        other: Of the kind ``SUM_QUANTIZE``: the gradient of ``x`` of all
            other readers.
    """

    kind: str = 'NOTHING'
    step: Tensor | None = None
    x: Tensor | None = None
    z: Tensor | None = None
    norm: BatchNorm | None = None
    other: Tensor | None = None

    def args(self, spare: Tensor) -> tuple:
        """For the kernels; ``spare`` stands for what is not read."""
        norm = self.norm
        values = [spare] * 4
        if norm is not None:
            values = [norm.mean, norm.rstd, norm.weight, norm.bias]
        given = [self.z, self.x, self.other, *values, self.step]
        return tuple(spare if each is None else each for each in given)


def input_grad(
    shape: Shape, config: Config, w: Tensor, after: After, before: Before,
    store: bool, qmin: int, qmax: int,
) -> Fused:  # fmt: skip
    """Gradient of what came before the quantizer of the input.

    Args:
        store: Whether to write the gradient of the convolution's output, too.

    Returns:
        Writes ``grad``, unless there is nothing before ``sums``, and with
        ``store`` ``grad_z``.
    """
    if before.kind == 'SUM_QUANTIZE' and shape.stride != 1:
        raise ValueError(f'a sum: expected stride 1, got {shape.stride}')
    n, k, rows = shape.inputs, shape.outputs, shape.rows
    tiles = -(-n // config.columns)
    # in front once for all columns, where that fits
    chunks = tiles if k <= config.depth else 1
    columns, splits = -(-tiles // chunks), -(-rows // config.rows)
    grad = after.grad
    out = _map(w, shape.batch, n, (shape.height, shape.width))
    written = dict(grad=out)
    grad_z = grad
    if store:
        written['grad_z'] = grad_z = _map(w, shape.batch, k, shape.out_size)
    parts = 1 if before.kind == 'QUANTIZE' else 3
    partial = _floats(w, parts, splits, n)
    even = _even(rows % config.rows, (n, config.columns), (k, config.depth))
    steps: list[Callable] = [
        Launch(
            'input_grad_kernel', columns * splits,
            (*after.args(), w, grad_z, *before.args(grad), out, partial,
             rows, n, splits, shape.height, shape.width),
            dict(K=k, QMIN=qmin, QMAX=qmax, FRONT=after.front(),
                 BEHIND=BEHIND[before.kind], STORE=store, EVEN=even,
                 STRIDE=shape.stride, CHUNKS=chunks, **config.flags()),
        )
    ]  # fmt: skip
    if before.kind != 'NOTHING':
        sums = written['sums'] = _floats(w, parts, n)
        steps.append(lambda: torch.sum(partial, 1, out=sums))
    return Fused(steps, written)


def weight_grad(
    shape: Shape, config: Config, after: After, q: Tensor, step: Tensor,
    qmin: int, qmax: int,
) -> Fused:  # fmt: skip
    """Gradient of the quantized weight; ``q`` as of :func:`product`.

    Returns:
        Writes ``grad_w``, (outputs, inputs), float32.
    """
    n, o, rows = shape.inputs, shape.outputs, shape.rows
    places = -(-n // config.columns) * -(-o // config.rows)
    repeats, splits = _split(
        rows, config.depth, places, config.programs, q.device
    )
    partial = _floats(q, splits, o, n)
    grad_w = _floats(q, o, n)
    even = _even(rows % config.depth, (n, config.columns), (o, config.rows))
    main = Launch(
        'weight_grad_kernel', places * splits,
        (*after.args(), q, step, partial, rows, o, n, shape.height,
         shape.width),
        dict(QMIN=qmin, QMAX=qmax, FRONT=after.front(), EVEN=even,
             CODES=q.dtype == torch.uint8, STRIDE=shape.stride,
             REPEATS=repeats, **config.flags()),
    )  # fmt: skip
    total = lambda: torch.sum(partial, 0, out=grad_w)  # noqa: E731
    return Fused([main, total], dict(grad_w=grad_w))


def configs(kernel: str, shape: Shape) -> Iterator[Config]:
    """The few ways worth trying on a Hopper GPU.

    Args:
        kernel: ``'product'``, ``'input_grad'`` or ``'weight_grad'``.
    """
    n, k = shape.outputs, shape.inputs
    if kernel == 'product':
        deep = k if k <= 128 else 64
        yield Config(64, min(n, 128), deep, 8 if n > 64 else 4, 3, 4, 128)
        yield Config(128, min(n, 128), deep, 8, 3, 2)
        if n >= 256:
            yield Config(128, 256, 64, 8, 4, 1)
        else:
            yield Config(64, 64, min(k, 256), 4, 2, 4, 128)
    elif kernel == 'weight_grad':
        wide, tall = min(k, 128), min(n, 128)
        yield Config(tall, wide, 64, 8 if tall * wide > 4096 else 4, 3, 2)
        yield Config(min(n, 64), min(k, 64), 128, 8, 2, 2, 128)
        if k >= 256:
            yield Config(tall, 256, 64, 8, 3, 1)
    elif n <= 128:  # in front, all channels at once
        yield Config(64, 64, n, 8, 2, registers=128)
        yield Config(64, 64, n, 8, 1, registers=128)
        yield Config(128, 64, n, 8, 2)
    else:
        yield Config(64, 64, 64, 8, 3, registers=128)
        yield Config(128, min(k, 128), 64, 8, 3)
        yield Config(64, min(k, 256), 64, 8, 3)
