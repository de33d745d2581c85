"""What fusing the 1x1 convolutions of ResNet-50 would bring to its step.

A measurement, not a part of the package: it decides whether such kernels are
worth writing. For each 1x1 convolution it times what a recorded step of W4A4
runs today and the kernels of :mod:`.fusion_kernels` in its place, forward and
backward apart, and sums over the network.

    python -m benchmarks.fusions --out DIR --minutes 4
    python -m benchmarks.fusions --out DIR --compile   # needs no GPU

A unit of the forward pass is what makes the quantized input (``produce``), the
convolution and the statistics of its output. A unit of the backward pass is
the second pass of batch norm's backward behind the convolution, both gradients
of the convolution, and the first pass of what made its input. So each kernel
of the step that touches a 1x1 convolution counts once. What follows a 3x3
convolution stays as it is.

Times are those of CUDA graphs by events, with a cold L2 cache, in turns.
"""

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmauxq.accelerate.kernels import lsq, norm
from mmauxq.accelerate.kernels.dispatch import use_form
from mmauxq.accelerate.kernels.norm import BatchNorm
from mmauxq.accelerate.kernels.tiles import launch, split_tiles, tiles

from . import fused_products as fused
from . import results
from .compile_ahead import Compiler
from .fused_products import After, Before, Config, Fused, Shape
from .timing import Timing, graphed

FILE = 'fusions.jsonl'
QMIN, QMAX = 0, 15
TODAY_MS, FLOAT_MS = 38.9, 37.4
"""A step of ResNet-50 at W4A4, and of compiled float (docs/speed.md)."""
FLUSH = 256 * 2**20
"""Bytes that are read before each timed call, several times the L2. What was
written instead would have to leave it in the timed call."""
DTYPES = dict(cpu=torch.float16)
"""Triton's interpreter has no product of bfloat16."""


@dataclass(frozen=True)
class Layer:
    """1x1 convolutions of ResNet-50 that are alike.

    Args:
        name: In the names of its modules.
        before: What makes the input, a key of ``fused.BEHIND``.
        masked: Whether a ReLU and a quantizer follow the batch norm, so that
            its second pass has a mask.
        inputs, outputs: Channels.
        size: Height and width of the input at 224 pixels.
        stride: Of the convolution.
        count: How many there are.
    """

    name: str
    before: str
    masked: bool
    inputs: int
    outputs: int
    size: int
    stride: int
    count: int

    def shape(self, batch: int, pixels: int) -> Shape:
        """With this many images of so many pixels."""
        size = max(1, self.size * pixels // 224)
        return Shape(batch, self.inputs, self.outputs, size, size, self.stride)


def layers() -> Iterator[Layer]:
    """The 1x1 convolutions of ResNet-50, those of large maps first."""
    for stage, (planes, size, blocks) in enumerate(
        [(64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3)], 1
    ):
        first, wide = stage == 1, 4 * planes
        inputs, large = (64, 56) if first else (2 * planes, 2 * size)
        name = f'layer{stage}'
        yield Layer(
            f'{name}.*.conv1', 'SUM_QUANTIZE', True, wide, planes, size, 1,
            blocks - 1,
        )  # fmt: skip
        yield Layer(
            f'{name}.*.conv3', 'NORM_QUANTIZE', False, planes, wide, size, 1,
            blocks,
        )  # fmt: skip
        yield Layer(
            f'{name}.0.conv1', 'QUANTIZE' if first else 'SUM_QUANTIZE', True,
            inputs, planes, large, 1, 1,
        )  # fmt: skip
        yield Layer(
            f'{name}.0.downsample', 'QUANTIZE', False, inputs, wide, large,
            1 if first else 2, 1,
        )  # fmt: skip


OTHERS = [('stem', 64, 112, 1), ('layer1', 64, 56, 3), ('layer2', 128, 28, 4),
          ('layer3', 256, 14, 6), ('layer4', 512, 7, 3)]  # fmt: skip
"""Outputs of the other convolutions: name, channels, size, count."""


class Case:
    """The tensors of a layer; on the device ``'meta'`` their shapes alone."""

    def __init__(self, layer: Layer, shape: Shape, device: str) -> None:
        self.layer, self.shape, self.device = layer, shape, device
        self.dtype = DTYPES.get(device, torch.bfloat16)
        size = shape.height, shape.width
        wide = shape.batch, shape.inputs, size
        out = shape.batch, shape.outputs, shape.out_size
        self.step = self.full(0.25)
        self.after_step = self.full(0.25)
        self.w = self.random(shape.outputs, shape.inputs, (1, 1))
        self.w /= shape.inputs**0.5
        self.norm_in = self.norm(shape.inputs)
        self.norm_out = self.norm(shape.outputs)
        self.running = torch.zeros(2, shape.outputs, device=device)
        self.x = self.z_in = self.other = self.identity = None
        kind = layer.before
        if kind != 'QUANTIZE':
            self.z_in = self.random(*wide)
        if kind == 'SUM_QUANTIZE':
            self.identity, self.other = self.random(*wide), self.random(*wide)
        if kind != 'NORM_QUANTIZE':
            self.x = self.random(*wide).relu_()
        self.grad, self.z = self.random(*out), self.random(*out)
        self.sums = self.random(3, shape.outputs, ()).float()
        self.codes = torch.empty(
            (shape.batch, shape.inputs, *size), dtype=torch.uint8,
            device=device, memory_format=torch.channels_last,
        )  # fmt: skip
        self.q = self.codes

    def full(self, value: float) -> Tensor:
        return torch.full((1,), value, device=self.device)

    def random(self, batch: int, channels: int, size: tuple) -> Tensor:
        x = torch.empty(
            (batch, channels, *size), dtype=self.dtype, device=self.device,
            memory_format=torch.channels_last
            if len(size) == 2
            else torch.contiguous_format,
        )  # fmt: skip
        return x.normal_()

    def norm(self, channels: int) -> BatchNorm:
        ones = torch.ones(4, channels, device=self.device)
        return BatchNorm(ones[0] * 0, ones[1], ones[2], ones[3] * 0.1)

    def fill(self) -> None:
        """Make what the forward pass makes, with today's kernels."""
        today = Today(self)
        self.q = today.produce()
        if self.layer.before == 'SUM_QUANTIZE':
            self.x = today.sum_of_produce()
        self.z = today.convolution()
        weight, bias = self.norm_out.weight, self.norm_out.bias
        self.norm_out = norm.batch_statistics(
            self.z, weight, bias, None, None, 0.1, fused.EPS
        )
        self.sums = today.sums_after()
        self.codes = self.coded()
        self.grad_z = today.norm_backward()

    def coded(self) -> Tensor:
        run = self.produce_codes()
        run()
        return run.out['codes']

    def produce_codes(self) -> Fused:
        """The input's codes, fused with what makes them."""
        if self.z_in is None:
            assert self.x is not None
            return fused.quantized_codes(self.x, self.step, QMIN, QMAX)
        return fused.normalised_codes(
            self.z_in, self.norm_in, self.identity, self.step, QMIN, QMAX
        )

    def after(self, plain: bool) -> After:
        """What follows; ``plain`` with the gradient of the output."""
        if plain:
            return After(getattr(self, 'grad_z', self.grad))
        step = self.after_step if self.layer.masked else None
        return After(self.grad, self.z, self.norm_out, self.sums, step)

    def before(self) -> Before:
        """What made the input."""
        has_norm = self.z_in is not None
        return Before(
            self.layer.before, self.step, self.x, self.z_in,
            self.norm_in if has_norm else None, self.other,
        )  # fmt: skip

    def fusions(self) -> dict[str, tuple[str, Callable[[Config], Fused]]]:
        """Name of each fused product -> (its kernel, what makes it)."""

        def product(q: Tensor, config: Config) -> Fused:
            return fused.product(
                self.shape, config, q, self.step, self.w, self.running, QMIN
            )

        def input_grad(plain: bool, store: bool, config: Config) -> Fused:
            return fused.input_grad(
                self.shape, config, self.w, self.after(plain), self.before(),
                store, QMIN, QMAX,
            )  # fmt: skip

        def weight_grad(plain: bool, config: Config) -> Fused:
            return fused.weight_grad(
                self.shape, config, self.after(plain), self.codes, self.step,
                QMIN, QMAX,
            )  # fmt: skip

        q = self.w.new_empty(()).expand(self.codes.shape)
        q = self.q if self.q.dtype == self.dtype else q
        return {
            'product, codes': ('product', partial(product, self.codes)),
            'product, values': ('product', partial(product, q)),
            'input, behind': ('input_grad', partial(input_grad, True, False)),
            'input, both': ('input_grad', partial(input_grad, False, False)),
            'input, both, kept': (
                'input_grad', partial(input_grad, False, True),
            ),
            'weight, kept': ('weight_grad', partial(weight_grad, True)),
            'weight, front': ('weight_grad', partial(weight_grad, False)),
        }  # fmt: skip

    def specs(self) -> Iterator[tuple[str, Config | None, tuple]]:
        """All launches that :func:`measure` may try."""
        for spec in self.produce_codes().specs():
            yield 'produce, codes', None, spec
        for name, (kernel, make) in self.fusions().items():
            for config in fused.configs(kernel, self.shape):
                for spec in make(config).specs():
                    yield name, config, spec


class Today:
    """What a recorded step runs for a layer."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.how = (True, case.step, QMIN, QMAX, 1.0)

    def produce(self) -> Tensor:
        """Quantized input."""
        c = self.case
        if c.z_in is None:
            return lsq.run_forward(c.x, c.step, None, QMIN, QMAX)
        if c.identity is None:
            return norm.normalise_quantize(c.z_in, c.norm_in, *self.how)
        return self._sum()[2]

    def sum_of_produce(self) -> Tensor:
        return self._sum()[0]

    def _sum(self) -> tuple[Tensor, Tensor, Tensor]:
        c = self.case
        assert c.z_in is not None and c.identity is not None
        return norm.norm_add_relu_quantize(
            c.z_in, c.norm_in, c.identity, *self.how
        )

    def convolution(self) -> Tensor:
        return F.conv2d(
            self.case.q, self.case.w, stride=self.case.shape.stride
        )

    def statistics(self) -> BatchNorm:
        c = self.case
        return norm.batch_statistics(
            c.z, c.norm_out.weight, c.norm_out.bias, *c.running,
            fused.MOMENTUM, fused.EPS,
        )  # fmt: skip

    def _first_pass(
        self, grad: Tensor, z: Tensor, normed: BatchNorm, step: Tensor | None,
        x: Tensor | None = None, other: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        """Gradient of a residual sum, if there is one, and the sums."""
        from mmauxq.accelerate.kernels.norm_triton import reduce_kernel

        given = (
            grad, z if other is None else other, z, z, z if x is None else x,
            normed.mean, normed.rstd, normed.weight, normed.bias,
            normed.mean if step is None else step,
        )  # fmt: skip
        programs, how = split_tiles(
            z, 1, norm.REDUCE_TILE, norm.REDUCE_PROGRAMS
        )
        partial = torch.empty(
            (2 if step is None else 3, how['splits'], z.shape[1]),
            device=z.device,
        )
        result = None if other is None else torch.empty_like(z)
        launch(
            reduce_kernel, z, programs, *given, partial,
            grad if result is None else result, IDENTITY=other is not None,
            QMIN=QMIN, QMAX=QMAX, RELU=step is not None,
            QUANTIZE=step is not None, OTHERS=int(other is not None),
            READ=x is not None, **how, num_warps=norm.REDUCE_WARPS,
        )  # fmt: skip
        return result, partial.sum(1)

    def sums_after(self) -> Tensor:
        """First pass of the batch norm after the convolution."""
        c = self.case
        step = c.after_step if c.layer.masked else None
        return self._first_pass(c.grad, c.z, c.norm_out, step)[1]

    def norm_backward(self) -> Tensor:
        """Its second pass: gradient of the convolution's output."""
        from mmauxq.accelerate.kernels.norm_triton import backward_kernel

        c, n, masked = self.case, self.case.norm_out, self.case.layer.masked
        grad_z = torch.empty_like(c.z)
        blocks, columns, how = tiles(c.z, 1, norm.BACKWARD_TILE)
        launch(
            backward_kernel, c.z, blocks * columns,
            c.grad, c.z, c.z, c.z, c.z, n.mean, n.rstd, n.weight, n.bias,
            c.after_step, c.sums, grad_z, QMIN=QMIN, QMAX=QMAX, RELU=masked,
            QUANTIZE=masked, OTHERS=0, READ=False, **how,
            num_warps=norm.WARPS,
        )  # fmt: skip
        return grad_z

    def _convolution_backward(self, which: int) -> Tensor:
        c, stride = self.case, [self.case.shape.stride] * 2
        return torch.ops.aten.convolution_backward(
            c.grad_z, c.q, c.w, None, stride, [0, 0], [1, 1], False, [0, 0],
            1, [which == 0, which == 1, False],
        )[which]  # fmt: skip

    def input_grad(self) -> Tensor:
        return self._convolution_backward(0)

    def weight_grad(self) -> Tensor:
        return self._convolution_backward(1)

    def first_pass(self, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        """Of what made the input, from the gradient of the input: the gradient
        of what was quantized, unless it is made again, and the sums."""
        c = self.case
        if c.z_in is None:
            found = lsq.run_backward(grad, c.x, c.step, None, QMIN, QMAX, 1.0)
            return found[0], found[1]
        return self._first_pass(grad, c.z_in, c.norm_in, c.step, c.x, c.other)


Runs = dict[str, Callable[[], Any]]


def interleaved(runs: Runs, repeats: int) -> dict[str, Timing]:
    """Time each as a CUDA graph, in turns, with a cold cache.

    Those that fail are left out, and said.
    """
    cuda = torch.cuda.is_available()
    ready: Runs = {}
    for name, run in runs.items():
        try:
            ready[name] = graphed(run) if cuda else run
        except Exception as error:
            print(f'  {name}: {_short(error)}', flush=True)
    device = 'cuda' if cuda else 'cpu'
    flush = torch.zeros(FLUSH // 4 if cuda else 1, device=device)
    total = torch.zeros((), device=device)
    taken: dict[str, list] = {name: [] for name in ready}
    for turn in range(repeats + 1):
        for name, run in ready.items():
            torch.sum(flush, 0, out=total)
            if cuda:
                marks = [torch.cuda.Event(enable_timing=True) for _ in 'ab']
                marks[0].record()
                run()
                marks[1].record()
            else:
                marks = [time.perf_counter()]
                run()
                marks.append(time.perf_counter())
            if turn:  # the first one warms up
                taken[name].append(marks)
    if cuda:
        torch.cuda.synchronize()
    found = {}
    for name, pairs in taken.items():
        times = sorted(
            a.elapsed_time(b) if cuda else (b - a) * 1e3 for a, b in pairs
        )
        low, high = (times[round(p * (repeats - 1))] for p in (0.1, 0.9))
        found[name] = Timing(statistics.median(times), low, high, repeats)
    return found


def _short(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'.replace('\n', ' ')[:300]


def traffic(layer: Layer, shape: Shape) -> dict[str, tuple[float, float]]:
    """The least bytes and the operations of each part."""
    read = shape.rows * shape.inputs
    wide, out = shape.in_rows * shape.inputs, shape.rows * shape.outputs
    w = 2 * shape.inputs * shape.outputs
    flop = 2 * shape.rows * shape.inputs * shape.outputs
    kind = layer.before
    extra = 4 * wide if kind == 'SUM_QUANTIZE' else 0
    behind = {
        'QUANTIZE': 2 * read + 2 * wide,
        'NORM_QUANTIZE': 4 * wide,
        'SUM_QUANTIZE': 8 * wide,
    }[kind]
    first = {'QUANTIZE': 6, 'NORM_QUANTIZE': 4, 'SUM_QUANTIZE': 10}[kind]
    return {
        'produce': (4 * wide + extra, 0),
        'convolution': (2 * read + 2 * out + w, flop),
        'statistics': (2 * out, 0),
        'produce, codes': (3 * wide + extra, 0),
        'product, codes': (read + 2 * out + w, flop),
        'product, values': (2 * read + 2 * out + w, flop),
        'second pass': (6 * out, 0),
        'input gradient': (2 * out + 2 * wide + w, flop),
        'weight gradient': (2 * out + 2 * read + w, flop),
        'first pass': (first * wide, 0),
        'input, behind': (2 * out + behind + w, flop),
        'input, both': (4 * out + behind + w, flop),
        'input, both, kept': (6 * out + behind + w, flop),
        'weight, kept': (2 * out + read + 2 * w, flop),
        'weight, front': (4 * out + read + 2 * w, flop),
    }


FORWARD = {
    'today': ('produce', 'convolution', 'statistics'),
    'statistics': ('produce', 'product, values'),
    'codes': ('produce, codes', 'product, codes'),
}
"""Forms of the forward pass and their parts; ``codes`` keeps no values."""
BACKWARD = {
    'today': ('second pass', 'input gradient', 'weight gradient',
              'first pass'),
    'behind': ('second pass', 'input, behind', 'weight gradient'),
    'kept': ('input, both, kept', 'weight gradient'),
    'codes': ('second pass', 'input gradient', 'weight, kept', 'first pass'),
    'codes, behind': ('second pass', 'input, behind', 'weight, kept'),
    'codes, kept': ('input, both, kept', 'weight, kept'),
    'codes, both': ('input, both', 'weight, front'),
}  # fmt: skip
"""Forms of the backward pass; those with codes follow ``codes``."""


def tune(
    case: Case, repeats: int, left_out: set
) -> Iterator[tuple[str, Config, Fused, dict]]:
    """The best config of each fused product, and what the others took."""
    for name, (kernel, make) in case.fusions().items():
        made = {}
        configs = list(fused.configs(kernel, case.shape))
        for config in configs if case.device == 'cuda' else configs[:1]:
            try:
                run = make(config)
                if left_out.isdisjoint(run.specs()):
                    run()
                    made[str(config)] = config, run
            except Exception as error:
                print(f'  {name}, {config}: {_short(error)}', flush=True)
        runs: Runs = {key: run for key, (_, run) in made.items()}
        times = interleaved(runs, repeats)
        if times:
            best = min(times, key=lambda key: times[key].ms)
            tried = {key: round(t.ms, 4) for key, t in times.items()}
            yield name, *made[best], tried


def wrong_parts(case: Case, best: dict[str, Fused]) -> dict[str, float]:
    """Norm of the difference to today's kernels as a part of their norm."""
    today = Today(case)
    expected: dict[str, Tensor | None] = dict(
        z=case.z, mean=case.norm_out.mean, rstd=case.norm_out.rstd,
        grad_z=case.grad_z, grad_w=today.weight_grad()[:, :, 0, 0],
    )  # fmt: skip
    expected['grad'], expected['sums'] = today.first_pass(today.input_grad())
    errors = {}
    for name, run in best.items():
        run()
        for key, value in run.out.items():
            target = expected.get(key)
            if target is None:
                continue
            value, target = value.float(), target.float()
            if case.z_in is None and key == 'sums':
                value, target = value.sum(), target.sum()
            error = (value - target).norm() / target.norm()
            errors[f'{name}: {key}'] = round(error.item(), 6)
    return errors


def measure(
    layer: Layer, shape: Shape, device: str, repeats: int, left_out: set,
    ceilings: dict,
) -> dict:  # fmt: skip
    """The row of a layer."""
    case = Case(layer, shape, device)
    case.fill()
    today = Today(case)
    grad_in = today.input_grad()
    parts: Runs = {
        'produce': today.produce,
        'convolution': today.convolution,
        'statistics': today.statistics,
        'second pass': today.norm_backward,
        'input gradient': today.input_grad,
        'weight gradient': today.weight_grad,
        'first pass': lambda: today.first_pass(grad_in),
        'produce, codes': case.produce_codes(),
    }
    row: dict[str, Any] = dict(
        inputs=shape.inputs, outputs=shape.outputs, size=shape.height,
        stride=shape.stride, batch=shape.batch, count=layer.count,
        before=layer.before, configs={}, tried={},
    )  # fmt: skip
    best = {}
    for name, config, run, tried in tune(case, max(3, repeats // 4), left_out):
        parts[name] = best[name] = run
        row['configs'][name], row['tried'][name] = str(config), tried
    row['errors'] = wrong_parts(case, best)
    wholes: Runs = {}
    for way, forms in (('forward', FORWARD), ('backward', BACKWARD)):
        for form, names in forms.items():
            if all(name in parts for name in names):
                wholes[f'{way}/{form}'] = _one_by_one(
                    [parts[n] for n in names]
                )
    times = interleaved({**parts, **wholes}, repeats)
    bytes_and_flop = traffic(layer, shape)
    row['parts'] = {}
    for name in parts.keys() & times.keys():
        size, flop = bytes_and_flop[name]
        floor = size / ceilings['bytes_per_ms']
        floor = max(floor, flop / ceilings['flop_per_ms'])
        ms = times[name].ms
        row['parts'][name] = dict(
            times[name].record(),
            gb_per_s=round(size / ms / 1e6, 1),
            of_bandwidth=round(size / ms / ceilings['bytes_per_ms'], 3),
            of_floor=round(floor / ms, 3),
        )
    row['forms'] = {n: times[n].record() for n in wholes if n in times}
    return row


def _one_by_one(runs: list[Callable]) -> Callable[[], None]:
    def run() -> None:
        for each in runs:
            each()

    return run


def compiled_float(
    layer: Layer, shape: Shape, device: str, repeats: int
) -> dict:
    """The layer in float, compiled: convolution, batch norm, and before an
    addition that, ReLU. Forward, and both ways."""
    from torch._functorch import config as functorch

    case = Case(layer, shape, device)
    x = case.random(
        shape.batch, shape.inputs, (shape.height, shape.width)
    ).requires_grad_()
    identity = None
    if layer.before == 'NORM_QUANTIZE':
        identity = torch.randn_like(case.z).requires_grad_()
    relu = layer.masked or identity is not None
    w = case.w.detach().requires_grad_()
    gamma, beta = (torch.ones(shape.outputs, device=device) for _ in 'gb')
    inputs = [x, w, gamma.requires_grad_(), beta.requires_grad_()]
    inputs += [] if identity is None else [identity]

    def forward() -> Tensor:
        y = F.conv2d(x, w, stride=shape.stride)
        y = F.batch_norm(y, *case.running, gamma, beta, True, 0.1, fused.EPS)
        y = y if identity is None else y + identity
        return F.relu(y) if relu else y

    torch._dynamo.reset()
    with functorch.patch(donated_buffer=False):
        run = torch.compile(forward, dynamic=False)

        def both() -> Any:
            return torch.autograd.grad(run(), inputs, case.grad)

        both()
        times = interleaved({'forward': run, 'both': both}, repeats)
    return dict(count=layer.count, **{n: t.record() for n, t in times.items()})


def ceilings(device: str, repeats: int) -> dict:
    """What a copy, a matrix product and nothing reach."""
    cuda, dtype = device == 'cuda', torch.bfloat16
    x = torch.randn(2**30 if cuda else 2**10, device=device).to(dtype)
    y, n = torch.empty_like(x), 8192 if cuda else 32
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in 'ab')
    times = interleaved(
        dict(
            copy=lambda: y.copy_(x), product=lambda: a @ b,
            nothing=lambda: y[:1].zero_(),
        ),
        repeats,
    )  # fmt: skip
    return dict(
        bytes_per_ms=2 * x.nbytes / times['copy'].ms,
        flop_per_ms=2 * n**3 / times['product'].ms,
        nothing_ms=round(times['nothing'].ms, 5),
    )


def other_statistics(
    batch: int, pixels: int, device: str, repeats: int
) -> dict:
    """Milliseconds of a step in statistics of the other convolutions."""
    total, each = 0.0, {}
    for name, channels, size, count in OTHERS:
        size = max(1, size * pixels // 224)
        z = torch.empty(
            (batch, channels, size, size), dtype=torch.bfloat16, device=device,
            memory_format=torch.channels_last,
        ).normal_()  # fmt: skip
        weight, bias = torch.ones(2, channels, device=device)
        how = z, weight, bias, None, None, 0.1, fused.EPS
        runs: Runs = dict(run=partial(norm.batch_statistics, *how))
        each[name] = interleaved(runs, repeats)['run'].record()
        total += each[name]['ms'] * count
    return dict(total_ms=round(total, 4), each=each)


def summary(rows: list[dict]) -> dict:
    """What the layers that were measured save in a step, in ms.

    ``all`` has a form in each layer, ``best`` only where it is faster. A form
    of the backward pass with codes needs the forward pass with codes.
    """
    found: dict[str, Any] = {}
    measured = [row for row in rows if row.get('forms')]

    def ms(row: dict, way: str, form: str) -> float:
        return row['forms'].get(f'{way}/{form}', {}).get('ms', float('inf'))

    for way, forms in (('forward', FORWARD), ('backward', BACKWARD)):
        today = [ms(r, way, 'today') * r['count'] for r in measured]
        found[f'{way}/today'] = sum(today)
        for form in forms:
            saved = [
                old - ms(row, way, form) * row['count']
                for old, row in zip(today, measured, strict=True)
            ]
            found[f'{way}/{form} saves'] = dict(
                all=sum(saved), best=sum(max(0.0, s) for s in saved)
            )
    values = [n for n in BACKWARD if not n.startswith('codes')]
    codes = [n for n in BACKWARD if n.startswith('codes')]
    steps = {
        'statistics': (['today', 'statistics'], ['today'], []),
        'statistics, behind': (['today', 'statistics'], values, []),
        'and codes': (['today', 'statistics'], values, codes),
    }
    saved_by = {}
    for step, (forward, backward, with_codes) in steps.items():
        saved_by[step] = 0.0
        for row in measured:
            f, b = partial(ms, row, 'forward'), partial(ms, row, 'backward')
            ways = [f(x) + b(y) for x in forward for y in backward]
            ways += [f('codes') + b(y) for y in with_codes]
            before = f('today') + b('today')
            saved_by[step] += row['count'] * (before - min(ways))
    found['saved by'] = saved_by
    found['predicted step'] = {
        step: dict(
            ms=TODAY_MS - saved,
            of_today=(TODAY_MS - saved) / TODAY_MS,
            of_compiled_float=(TODAY_MS - saved) / FLOAT_MS,
        )
        for step, saved in saved_by.items()
    }
    found['layers'] = sum(row['count'] for row in measured)
    found['largest error'] = max(
        (e for row in measured for e in row.get('errors', {}).values()),
        default=0.0,
    )
    return _rounded(found)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, float) and abs(value) < float('inf'):
        return round(value, 4)
    return str(value) if isinstance(value, float) else value


def specs_of(
    chosen: list[tuple[Layer, Shape]],
) -> Iterator[tuple[Layer, str, Config | None, tuple]]:
    """All launches, layer by layer."""
    for layer, shape in chosen:
        for name, config, spec in Case(layer, shape, 'meta').specs():
            yield layer, name, config, spec


def compile_all(chosen: list[tuple[Layer, Shape]], out: Path) -> int:
    """Compile all launches for Hopper without a GPU; 1 if one does not fit."""
    known = list(specs_of(chosen))
    of = {spec: (layer, name, c) for layer, name, c, spec in known}
    print(f'{len(of)} launches', flush=True)
    bad = 0
    for spec, row in Compiler(of).results():
        layer, name, config = of[spec]
        bad += 'error' in row
        results.append(
            out,
            dict(layer=layer.name, part=name, kernel=spec[0],
                 config=str(config), **row),
            'compiled.jsonl',
        )  # fmt: skip
        if 'error' in row:
            print(layer.name, name, spec[0], config, row, flush=True)
    print(f'{bad} of them do not fit')
    return int(bad > 0)


def run(args: argparse.Namespace) -> int:
    """Measure; 1 if a layer failed or the time was over."""
    start = time.perf_counter()
    chosen = [
        (layer, layer.shape(args.batch, args.size)) for layer in layers()
    ][: args.layers]
    if args.compile:
        return compile_all(chosen, args.out)
    known = {
        row['arm']: row
        for row in results.read(args.out, FILE)
        if 'error' not in row
    }
    cuda = torch.cuda.is_available()
    device = 'cuda' if cuda else 'cpu'
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    missing = [pair for pair in chosen if pair[0].name not in known]
    specs = [spec for *_, spec in specs_of(missing)]
    compiler = Compiler(specs if cuda else [])

    def late() -> bool:
        return time.perf_counter() - start > 60 * args.minutes

    def note(arm: str, row: dict) -> dict:
        row = dict(arm=arm, **_rounded(row), **results.machine())
        row['at_s'] = round(time.perf_counter() - start, 1)
        results.append(args.out, row, FILE)
        return row

    def attempt(arm: str, make: Callable[[], dict]) -> dict:
        if arm in known:
            return known[arm]
        if late() or arm in args.without:
            return dict(error='no time left' if late() else 'left out')
        try:
            row = make()
        except Exception as error:
            traceback.print_exc()
            row = note(arm, dict(error=_short(error)))
            if cuda and _is_broken():
                compiler.close()
                _begin_again(args, arm, time.perf_counter() - start)
            return row
        return note(arm, row)

    rows = []
    with use_form('auto' if cuda else 'kernel'), torch.no_grad():
        top = ceilings(device, args.repeats)
        note('ceilings', top)
        print(json.dumps(_rounded(top)), flush=True)
        for layer, shape in chosen:

            def one(layer: Layer = layer, shape: Shape = shape) -> dict:
                wanted = [spec for *_, spec in specs_of([(layer, shape)])]
                bad = compiler.errors(wanted)
                for spec, error in bad.items():
                    print(f'  left out: {spec[0]}: {error}', flush=True)
                return measure(
                    layer, shape, device, args.repeats, set(bad), top
                )

            rows.append(attempt(layer.name, one))
            print(_line(layer, rows[-1]), flush=True)
            if cuda:
                torch.cuda.empty_cache()
        compiler.close()
        others = partial(
            other_statistics, args.batch, args.size, device, args.repeats
        )
        print(json.dumps(attempt('other statistics', others)), flush=True)
    total = 0.0
    for layer, shape in chosen if args.float else ():
        compiled = partial(compiled_float, layer, shape, device, args.repeats)
        row = attempt(f'float/{layer.name}', compiled)
        rows.append(row)
        ms = row.get('both', {}).get('ms', float('nan'))
        total += ms * layer.count
        print(f'compiled float, {layer.name}: {ms:.3f} ms', flush=True)
    found = summary(rows)
    if args.float:
        found['compiled float, these layers'] = _rounded(total)
    note('summary', found)
    print(json.dumps(found, indent=1), flush=True)
    return int(any('error' in row for row in rows))


def _is_broken() -> bool:
    """Whether the GPU refuses this process from now on."""
    try:
        torch.cuda.synchronize()
        torch.empty(1, device='cuda').zero_()
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _begin_again(
    args: argparse.Namespace, without: str, seconds: float
) -> None:
    """Go on in a fresh process, without what broke this one."""
    print(f'begin again without {without}', flush=True)
    command = [sys.executable, '-m', 'benchmarks.fusions']
    for name in ('out', 'layers', 'batch', 'size', 'repeats'):
        value = getattr(args, name)
        command += [] if value is None else [f'--{name}', str(value)]
    command += ['--minutes', str(args.minutes - seconds / 60)]
    command += [] if args.float else ['--no-float']
    os.execv(
        sys.executable, [*command, '--without', *args.without, without]
    )  # fmt: skip


def _line(layer: Layer, row: dict) -> str:
    start = f'{row.get("at_s", 0):.0f} s: {layer.name} x{layer.count}: '
    if 'error' in row:
        return start + row['error']
    forms = ', '.join(f'{n} {t["ms"]:.3f}' for n, t in row['forms'].items())
    worst = max(row['errors'].values(), default=0)
    return f'{start}{forms}; errors up to {worst}'


def main(argv: list[str] | None = None) -> int:
    """The command, with the arguments of this process or others."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add('--out', type=Path, required=True, help='folder of the results')
    add('--layers', type=int, metavar='N', help='only the first so many')
    add('--minutes', type=float, default=4, metavar='M',
        help='begin nothing after so many (default: 4)')
    add('--batch', type=int, default=256)
    add('--size', type=int, default=224, help='pixels (default: 224)')
    add('--repeats', type=int, default=20, metavar='N')
    add('--no-float', dest='float', action='store_false',
        help='without the compiled layers in float')
    add('--without', nargs='+', default=[], metavar='NAME',
        help='layers that are left out')
    add('--compile', action='store_true',
        help='only compile all kernels for Hopper, which needs no GPU')
    # fmt: on
    return run(parser.parse_args(argv))


if __name__ == '__main__':
    raise SystemExit(main())
