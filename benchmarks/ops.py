"""How fast the quantizers are, beside a copy of the same bytes."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from mmauxq.accelerate.kernels.dispatch import use_form
from mmauxq.accelerate.kernels.weights import GroupedQuantizer, WeightRange
from mmauxq.quantizers import functional as ops

from .peers.quantizers import mmrazor_quantizer
from .timing import graphed, kernel_ms, timed

QMAX = 15
LARGE = [
    ((256, 256, 56, 56), 'bfloat16', True),
    ((256, 256, 56, 56), 'bfloat16', False),
    ((256, 256, 56, 56), 'float16', True),
    ((256, 128, 56, 56), 'float32', True),
    ((255, 257, 55, 57), 'bfloat16', True),
    ((256, 197, 1536), 'bfloat16', False),
    ((32, 64, 56, 56), 'bfloat16', True),
]
SMALL = [((2, 8, 7, 9), 'float32', True), ((2, 5, 6), 'bfloat16', False)]

Op = Callable[[Tensor, Tensor], Tensor] | nn.Module
"""Of ``x`` and a step; a module has a step of its own."""


def contenders(
    x: Tensor, device: str
) -> Iterator[tuple[str, Callable[[], Op], bool]]:
    """Quantizers of this package, of torch and of others.

    Yields:
        (name, what makes the op, whether it learns the step).
    """
    scale = 1 / math.sqrt(x[0].numel() * QMAX)
    zero = torch.zeros(1, device=device)

    def ours(form: str) -> Callable[[Tensor, Tensor], Tensor]:
        def run(x: Tensor, step: Tensor) -> Tensor:
            with use_form(form):
                return ops.learned_step_quantize(
                    x, step, 0, QMAX, grad_scale=scale
                )

        return run

    if device == 'cuda':
        yield 'mmauxq', lambda: ours('kernel'), True
        yield 'mmauxq, compiled', lambda: torch.compile(ours('auto')), True
    yield 'mmauxq, reference', lambda: ours('reference'), True

    def torch_fixed(x: Tensor, step: Tensor) -> Tensor:
        zero_point = torch.zeros(1, dtype=torch.int32, device=device)
        return torch.fake_quantize_per_tensor_affine(
            x, step.detach(), zero_point, 0, QMAX
        )

    yield 'torch, fixed step', lambda: torch_fixed, False

    def torch_learned(x: Tensor, step: Tensor) -> Tensor:
        return torch._fake_quantize_learnable_per_tensor_affine(
            x, step, zero, 0, QMAX, scale
        )

    yield 'torch, learned step', lambda: torch_learned, True
    yield 'mmrazor', lambda: _mmrazor().to(device), True
    yield 'brevitas', lambda: _brevitas().to(device), True


def _mmrazor() -> nn.Module:
    quantizer = mmrazor_quantizer(4, 'activation')
    quantizer.scale.data.fill_(0.25)
    return quantizer.enable_param_learning()


def _brevitas() -> nn.Module:
    from brevitas.nn import QuantIdentity
    from brevitas.quant import Uint8ActPerTensorFloatMaxInit

    return QuantIdentity(
        act_quant=Uint8ActPerTensorFloatMaxInit,
        bit_width=4,
        max_val=0.25 * QMAX,
    )


def activations(device: str, repeats: int, tiny: bool) -> Iterator[dict]:
    """Rows of the table of activation quantizers.

    Args:
        device: ``'cuda'`` or ``'cpu'``.
        repeats: Number of measurements.
        tiny: Whether to take small tensors, to see that everything runs.
    """
    for shape, dtype, channels_last in SMALL if tiny else LARGE:
        x = torch.randn(shape, device=device).mul_(1.5).relu_()
        x = x.to(getattr(torch, dtype))
        if channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        grad = torch.randn_like(x)
        size, inner = x.nbytes, 1 if tiny else 5
        y = torch.empty_like(x)
        copy = timed(lambda y=y, x=x: y.copy_(x), repeats, inner=inner)
        bandwidth = 2 * size / copy.ms
        layout = 'channels last' if channels_last else 'contiguous'
        base = dict(shape=list(shape), dtype=dtype, layout=layout)
        yield dict(
            base,
            name='copy',
            **copy.record('forward_'),
            gb_per_s=round(bandwidth / 1e6, 1),
        )
        del y
        for name, make, learned in contenders(x, device):
            row = dict(base, name=name, learned=learned)
            try:
                # the same graph goes backward many times
                with functorch.patch(donated_buffer=False):
                    row.update(
                        _one(make(), x, grad, repeats, inner, bandwidth)
                    )
            except Exception as error:  # not installed, or broken
                row['error'] = f'{type(error).__name__}: {error}'[:300]
            yield row


def _one(
    op: Op, x: Tensor, grad: Tensor, repeats: int, inner: int, bandwidth: float
) -> dict:
    x = x.detach().requires_grad_()
    step = torch.full((1,), 0.25, device=x.device, requires_grad=True)
    inputs = [x, step]
    run = partial(op, x, step)
    if isinstance(op, nn.Module):
        inputs = [x, *(p for p in op.parameters() if p.requires_grad)]
        run = partial(op, x)
    y = run()
    upstream = grad.to(y.dtype)
    forward = timed(run, repeats, inner=inner)
    backward = timed(
        lambda: torch.autograd.grad(
            y, inputs, upstream, retain_graph=True, allow_unused=True
        ),
        repeats,
        inner=inner,
    )
    return dict(
        **forward.record('forward_'),
        **backward.record('backward_'),
        # read and write; read two and write one
        forward_of_copy=round(2 * x.nbytes / forward.ms / bandwidth, 4),
        backward_of_copy=round(3 * x.nbytes / backward.ms / bandwidth, 4),
    )


def weights(
    layers: list[tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    device: str,
    repeats: int,
) -> Iterator[dict]:
    """Rows of the table of a network's weights.

    Args:
        layers: (weight, step) of each layer, float32, on the device.
        dtype: Of the quantized weights.
        device: ``'cuda'`` or ``'cpu'``.
        repeats: Number of measurements.
    """
    ranges = [
        WeightRange(-8, 7, 1 / math.sqrt(w[0].numel() * 7)) for w, _ in layers
    ]
    tensors = [w for w, _ in layers] + [s for _, s in layers]
    half = len(layers)

    def one_by_one(form: str) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            with use_form(form):
                return [
                    ops.learned_step_quantize(
                        w,
                        ops.clamp_min_ste(s).reshape(-1, *[1] * (w.dim() - 1)),
                        r.qmin,
                        r.qmax,
                        grad_scale=r.grad_scale,
                    ).to(dtype)
                    for (w, s), r in zip(layers, ranges, strict=True)
                ]

        return run

    together = GroupedQuantizer(ranges)
    forms = {'reference, one by one': one_by_one('reference')}
    if device == 'cuda':
        forms = {
            'all at once': lambda: together(
                tensors[:half], tensors[half:], dtype
            ),
            'kernels, one by one': one_by_one('kernel'),
            **forms,
        }
    size = sum(w.numel() for w, _ in layers)
    for name, run in forms.items():
        grads = [torch.randn_like(y) for y in run()]

        def both(run=run, grads=grads):
            return torch.autograd.grad(run(), tensors, grads)

        row = dict(name=name, weights=len(layers), values=size)
        row.update(timed(both, repeats).record('eager_'))
        if device == 'cuda':
            row['kernels_ms'] = round(kernel_ms(both, repeats), 5)
            row.update(timed(graphed(both), repeats).record('graph_'))
        yield row
