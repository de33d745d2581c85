"""How long a training step takes, and how much memory, in each form."""

import contextlib
import fcntl
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

import mmauxq
from mmauxq import compat

from .timing import graphed, peak_gib, timed

CONFIGS = Path(mmauxq.__file__).parent / '.mim' / 'configs'
GUIDANCE = {
    'w4a4': ('qat', {}),
    'aux': ('aux', {}),
    'aux-amp': ('aux', dict(dtype=None)),
    'aux-quarter': ('aux', dict(width_ratio=0.25)),
    'aux-quarter-amp': ('aux', dict(width_ratio=0.25, dtype=None)),
    'dsn': ('dsn', {}),
    'kd': ('kd', {}),
}
"""What is trained -> the recipe, and what changes in its guidance."""

RECIPES = {'float': ('qat', {}), **GUIDANCE}
"""The same, with the network in float, or the recipe at 32 bits."""

FORMS = {
    'eager': {},
    'reference': {},
    'graph': {},
    'codes': dict(memory='codes'),
    'recompute': dict(memory='recompute'),
    'graphed': dict(cuda_graph=True),
    'graphed-codes': dict(cuda_graph=True, memory='codes'),
    'graphed-recompute': dict(cuda_graph=True, memory='recompute'),
    'chained': {},
    'chained-codes': dict(memory='codes'),
    'chained-recompute': dict(memory='recompute'),
    'compiled': dict(compile=True),
    'compiled-reference': dict(compile=True),
    'compiled-kernel': dict(compile=True),
    'compiled-codes': dict(compile=True, memory='codes'),
    'compiled-recompute': dict(compile=True, memory='recompute'),
    'compiled-graph': dict(compile=dict(mode='reduce-overhead')),
}
"""Form of the step -> arguments of JointQAT; see :func:`_context`."""

OPTIONS = {
    'plain': [],
    'compiled': ['--compile'],
    'compiled-fused': [
        '--compile',
        '--cfg-options',
        'optim_wrapper.optimizer.fused=True',
    ],  # as the optimizer of a recorded step is
    'graphed': ['--cuda-graph'],
    'graphed-codes': ['--cuda-graph', '--cfg-options', 'model.memory=codes'],
    'codes': ['--cfg-options', 'model.memory=codes'],
    'recompute': ['--cfg-options', 'model.memory=recompute'],
    'syncbn': ['--cfg-options', 'sync_bn=torch'],
}
"""Form of the step -> arguments of ``tools/train.py``."""


class Turn:
    """One process at a time on the GPU; compiling needs no turn.

    Args:
        path: The file that is locked.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open('w')

    def take(self) -> None:
        """Wait for it."""
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def give(self) -> None:
        """Let another one work."""
        fcntl.flock(self.file, fcntl.LOCK_UN)


def build(network: str, what: str, form: str, size: int, turn: Turn):
    """The model of an arm, on its device, ready to train.

    Args:
        network: Short name of a network in the recipes, such as ``'r50'``.
        what: One of ``RECIPES``.
        form: One of ``FORMS``.
        size: Height and width of the images.
        turn: Given away while a compiler works.
    """
    compat.enable()
    init_default_scope('mmpretrain')
    from mmengine.logging import MMLogger
    from mmpretrain.registry import MODELS

    MMLogger.get_instance('benchmark', log_level='ERROR')
    recipe, changes = RECIPES[what]
    cfg = Config.fromfile(CONFIGS / f'{recipe}_{network}_w4a4.py').model
    settings = dict(FORMS[form])
    if settings.get('compile') is True:
        settings['compile'] = dict(backend=_compiler(turn), dynamic=False)
    if what == 'float':
        model = MODELS.build(cfg.architecture)
        model.init_weights()
        step = _float_step(model, settings.get('compile'))
    else:
        cfg.float_checkpoint = None
        if cfg.get('guidance') is not None:
            cfg.guidance.update(changes)
        model = MODELS.build(
            dict(cfg, input_shape=(3, size, size), **settings)
        )
        model.init_weights()

        def step(inputs: Tensor, samples: list) -> Tensor:
            losses = model.loss(inputs, samples)
            return sum(v for k, v in losses.items() if 'loss' in k)

    model.train()
    if torch.cuda.is_available():
        model.cuda().to(memory_format=torch.channels_last)
    return model, step


def _float_step(model: nn.Module, compile: dict | None) -> Callable:
    def forward(inputs: Tensor) -> Tensor:
        return model.head(model.extract_feat(inputs))

    run = torch.compile(forward, **compile) if compile else forward

    def step(inputs: Tensor, samples: list) -> Tensor:
        return model.head._get_loss(run(inputs), samples)['loss']

    return step


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
def _context(form: str) -> Iterator[None]:
    """Settings of the process that belong to a form."""
    from torch._functorch import config as functorch

    from mmauxq.ops import use_form

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
    network: str,
    what: str,
    form: str,
    batch: int,
    size: int,
    repeats: int,
    turn: Turn,
) -> dict:
    """A row of the table of steps; see :func:`build`."""
    from mmpretrain.structures import DataSample

    cuda = torch.cuda.is_available()
    device = 'cuda' if cuda else 'cpu'
    torch.backends.cudnn.set_flags(_benchmark=True)
    with _context(form):
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
        if cuda:
            step()  # compiles, and chooses algorithms

        def steps() -> None:
            for _ in range(3 if cuda else 1):
                step()

        run = step
        row: dict[str, Any] = dict(peak_gib=peak_gib(steps))
        if form == 'graph' and cuda:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            run = graphed(step)
            row['peak_gib'] = torch.cuda.max_memory_allocated() / 2**30
        ready = time.perf_counter() - start
        host = time.perf_counter()
        timing = timed(run, repeats, warmup=1 if cuda else 0)
        host = (time.perf_counter() - host) * 1e3 / (repeats + int(cuda))
        row.update(timing.record())
        row.update(
            wall_ms=round(host, 4),
            images_per_s=round(batch / timing.ms * 1e3, 1),
            ready_s=round(ready, 1),
            first_loss=first,
            last_loss=step().item(),
        )
        turn.give()
    return row


def weights_of(network: str, size: int, turn: Turn) -> list:
    """(weight, step) of the quantized layers of a network, calibrated."""
    model, step = build(network, 'w4a4', 'eager', size, turn)
    layers = []
    for module in model.architecture.modules():
        quantizer = getattr(module, 'weight_quantizer', None)
        if quantizer is None:
            continue
        w = module.weight.detach().requires_grad_()
        s = 2 * w.detach().abs().flatten(1).mean(1) / 7**0.5
        layers.append((w, s.requires_grad_()))
    return layers


def write_config(
    work_dir: Path, network: str, what: str, batch: int, length: int,
    size: int, ranks: int = 1, more: str = '',
) -> Path:  # fmt: skip
    """A recipe on generated images, for one epoch; nothing is saved.

    Args:
        work_dir: Where it goes.
        network: As in :func:`build`.
        what: One of ``RECIPES``.
        batch: Images in a step of a rank.
        length: Number of images, of all ranks together.
        size: Their height and width.
        ranks: Share the cores of this machine for their loaders.
        more: Lines at the end.
    """
    recipe, changes = RECIPES[what]
    workers = min(8, max(1, (os.cpu_count() or 2) // (2 * ranks)))
    lines = [
        f'_base_ = {str(CONFIGS / f"{recipe}_{network}_w4a4.py")!r}',
        f'train_dataloader = dict(_delete_=True, batch_size={batch},',
        f'    num_workers={workers},',
        '    persistent_workers=True, pin_memory=True, drop_last=True,',
        "    sampler=dict(type='DefaultSampler', shuffle=True),",
        "    collate_fn=dict(type='default_collate'),",
        "    dataset=dict(type='mmauxq.GeneratedImages',",
        f'        length={length}, shape=(3, {size}, {size})))',
        'train_cfg = dict(_delete_=True, by_epoch=True, max_epochs=1)',
        'param_scheduler = []',  # those of the recipe may begin later
        'val_cfg = val_dataloader = val_evaluator = None',
        'test_cfg = test_dataloader = test_evaluator = None',
        'default_hooks = dict(',
        '    checkpoint=dict(interval=-1, save_last=False, save_best=None))',
        'env_cfg = dict(cudnn_benchmark=True, mp_cfg=dict('
        "mp_start_method='fork'))",
        f'model = dict(float_checkpoint=None, input_shape=(3, {size}, {size})',
    ]
    if changes:
        lines[-1] += f', guidance={changes!r}'
    if what == 'float':
        lines[-1] += (
            ', quantizers=dict(weight=dict(bits=32), activation=dict(bits=32))'
        )
    lines[-1] += ')'
    work_dir.mkdir(parents=True, exist_ok=True)
    config = work_dir / 'config.py'
    config.write_text('\n'.join(lines) + '\n' + more)
    return config


def amp() -> list[str]:
    """Arguments of ``tools/train.py`` for bfloat16."""
    if torch.cuda.is_available():
        return ['--amp', '--cfg-options', 'optim_wrapper.dtype=bfloat16']
    return ['--amp']


def runner_overhead(
    network: str, what: str, options: list[str], batch: int, steps: int,
    size: int, work_dir: Path, turn: Turn,
) -> dict:  # fmt: skip
    """A row: milliseconds of an iteration of ``tools/train.py``.

    Args:
        network: As in :func:`build`.
        what: As there.
        options: More arguments of ``tools/train.py``, such as ``--compile``.
        batch: Images in a step.
        steps: Iterations; those before the 20th, or the first half of fewer,
            do not count. The log has the mean of each ten.
        size: Height and width of the generated images.
        work_dir: Where config and logs go.
        turn: Taken for the whole run.
    """
    from mmauxq.cli import run

    each = max(1, min(10, steps // 4))
    config = write_config(
        work_dir, network, what, batch, batch * steps, size,
        more=f'default_hooks["logger"] = dict(interval={each})\n',
    )  # fmt: skip
    arguments = [
        str(config), '--work-dir', str(work_dir), *amp(), *options
    ]  # fmt: skip
    turn.take()
    status = run('train', arguments)
    turn.give()
    if status:
        raise RuntimeError(f'tools/train.py {" ".join(arguments)}: {status}')
    times, waits, peaks = [], [], []
    log = max(work_dir.rglob('scalars.json'))  # not those of runs before
    for line in log.read_text().splitlines():
        record = json.loads(line)
        if 'time' in record:
            times.append(record['time'] * 1e3)
            waits.append(record.get('data_time', 0.0) * 1e3)
            # MMEngine counts anew after each, and played steps allocate
            # nothing: the first has the peak
            peaks.append(record.get('memory', 0) / 2**10)
    late = slice(min(20 // each, len(times) // 2), None)
    return dict(
        ms=round(statistics.median(times[late]), 3),
        data_ms=round(statistics.median(waits[late]), 3),
        repeats=len(times[late]) * each,
        peak_gib=max(peaks) or None,
    )
