"""How long a training step takes, and how much memory, in each form."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from mmauxq import compat

from .processes import Turn
from .recipes import FLOAT_BITS, FORMS, RECIPES, recipe
from .timing import GIB, graphed, peak_gib, timed

LossOf = Callable[[Tensor, list], Tensor]


def build(
    network: str, what: str, form: str, size: int, turn: Turn
) -> tuple[nn.Module, LossOf]:
    """The model of an arm, on its device, in training mode; and its loss.

    Args:
        network: A key of ``NETWORKS``.
        what: A key of ``RECIPES``.
        form: A key of ``FORMS``.
        size: Height and width of the images in pixels.
        turn: Given away while a compiler works.
    """
    compat.enable()
    init_default_scope('mmpretrain')
    from mmpretrain.registry import MODELS

    MMLogger.get_instance('benchmark', log_level='ERROR')
    config = Config.fromstring(recipe(what, network), '.py')
    cfg = config.model
    settings = dict(FORMS[form])
    if settings.get('compile') is True:
        settings['compile'] = dict(backend=_compiler(turn), dynamic=False)
    if what == 'float' and not settings.get('cuda_graph'):
        model = MODELS.build(cfg.architecture)
        loss_of = _float_loss(model, settings.get('compile'))
    else:
        if what == 'float':
            config.merge_from_dict(dict(model=dict(quantizers=FLOAT_BITS)))
        cfg.float_checkpoint = None
        if cfg.get('guidance') is not None:
            cfg.guidance.update(RECIPES[what][1])
        cfg.update(input_shape=(3, size, size), speed=settings or None)
        model = MODELS.build(cfg)

        def loss_of(inputs: Tensor, samples: list) -> Tensor:
            losses = model.loss(inputs, samples)
            return sum(v for k, v in losses.items() if 'loss' in k)

    model.init_weights()
    model.train()
    if torch.cuda.is_available():
        model.cuda().to(memory_format=torch.channels_last)
    return model, loss_of


def _float_loss(model: nn.Module, compile: dict | None) -> LossOf:
    def forward(inputs: Tensor) -> Tensor:
        return model.head(model.extract_feat(inputs))

    run = torch.compile(forward, **compile) if compile else forward

    def loss_of(inputs: Tensor, samples: list) -> Tensor:
        return model.head._get_loss(run(inputs), samples)['loss']

    return loss_of


def _compiler(turn: Turn) -> Callable:
    """Inductor, but the GPU is free for others while it works."""

    def backend(module, inputs):
        from torch._inductor.compile_fx import compile_fx

        turn.give()
        try:
            return compile_fx(module, inputs)
        finally:
            turn.take()

    return backend


@contextlib.contextmanager
def _settings_of(form: str) -> Iterator[None]:
    """Settings of the process that belong to a form."""
    from torch._functorch import config as functorch

    from mmauxq.accelerate.kernels.dispatch import use_form

    ops = 'auto'
    if 'reference' in form:
        ops = 'reference'
    elif 'chained' in form or form == 'compiled-kernel':
        ops = 'kernel'
    with (
        use_form(ops),
        functorch.patch(force_non_lazy_backward_lowering=True),
    ):
        yield


def measure(
    network: str, what: str, form: str, batch: int, size: int, repeats: int,
    turn: Turn,
) -> dict:  # fmt: skip
    """Time forward, backward and optimizer on one batch of random images.

    Args:
        network: As of :func:`build`, like ``what``, ``form`` and ``size``.
        batch: Images in a step.
        repeats: Number of timed steps.
        turn: Taken from the first step to the last.
    """
    from mmpretrain.structures import DataSample

    cuda = torch.cuda.is_available()
    device = 'cuda' if cuda else 'cpu'
    torch.backends.cudnn.set_flags(_benchmark=True)
    with _settings_of(form):
        torch.manual_seed(0)
        model, loss_of = build(network, what, form, size, turn)
        turn.take()
        start = time.perf_counter()
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad],
            lr=1e-4,
            momentum=0.9,
            weight_decay=1e-4,
        )
        inputs = torch.randn(batch, 3, size, size, device=device)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        samples = [
            DataSample().set_gt_label(label).to(device)
            for label in torch.randint(1000, (batch,)).tolist()
        ]

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(inputs, samples)
            loss.backward()
            optimizer.step()
            return loss.detach()

        first = step().item()  # calibrates
        if cuda and 'graphed' not in form and form != 'auto':
            step()  # compiles, and chooses algorithms

        def steps() -> None:
            for _ in range(3 if cuda else 1):  # the first may be recorded
                step()

        run = step
        row: dict[str, Any] = dict(peak_gib=peak_gib(steps))
        if form == 'graph' and cuda:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run = graphed(step)
            row['peak_gib'] = torch.cuda.max_memory_allocated() / GIB
        ready = time.perf_counter() - start
        wall = time.perf_counter()
        timing = timed(run, repeats, warmup=1 if cuda else 0)
        wall = (time.perf_counter() - wall) * 1e3 / (repeats + int(cuda))
        row.update(timing.record())
        row.update(
            wall_ms=round(wall, 4),
            images_per_s=round(batch / timing.ms * 1e3, 1),
            ready_s=round(ready, 1),
            first_loss=first,
            last_loss=step().item(),
        )
        turn.give()
    return row


def weights_of(
    network: str, size: int, turn: Turn
) -> list[tuple[Tensor, Tensor]]:
    """(weight, step) of the quantized layers of a network.

    The steps start as LSQ's: twice the mean of ``|w|`` of a channel over the
    root of the largest code, 7.

    Args:
        network: As of :func:`build`, like ``size`` and ``turn``.
    """
    model, _ = build(network, 'w4a4', 'eager', size, turn)
    layers = []
    for module in model.architecture.modules():
        if getattr(module, 'weight_quantizer', None) is None:
            continue
        w = module.weight.detach().requires_grad_()
        s = 2 * w.detach().abs().flatten(1).mean(1) / 7**0.5
        layers.append((w, s.requires_grad_()))
    return layers
