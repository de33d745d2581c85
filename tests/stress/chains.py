"""Fused batch norms, and recorded steps, in all types of networks.

    python -m tests.stress.chains --jobs 2 --out DIR [CONFIG ...]
    python -m tests.stress.chains --recorded --jobs 8 --out DIR    # on a GPU

For the configs of docs/logs/backbones.jsonl, one for each type of backbone:
training steps with the auxiliary module, as ever and in chains. The kernels
are replaced by the operations of torch that they stand for, so that losses,
gradients and buffers must be equal to the bit; what is tried is that stand-ins
for results of batch norms pass through the networks.

With ``--recorded`` the kernels run, and the steps are launched one by one and
recorded as CUDA graphs, which must be equal to the bit as well.

DIR/chains.jsonl has a line for each config. The exit status is 0 only if all
are equal, but for the order of sums (see ``ALLOWED``), or refused with what
forbids a recording.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.coverage import build as networks
from benchmarks.coverage.row import Row as CoverageRow
from benchmarks.coverage.sweep import sweep
from mmauxq.accelerate import fused_norm as chains
from mmauxq.accelerate.cuda_graph import GraphedStep
from mmauxq.accelerate.kernels.dispatch import use_form
from mmauxq.algorithms import JointQAT
from mmauxq.errors import one_line
from mmauxq.quantizers.functional import learned_step_quantize
from tests.conftest import ROOT

IMAGES = 4
ALLOWED = 0.01
"""Relative error of a tensor. A batch norm that runs where it is read comes
later among the nodes of autograd, so that gradients of a tensor with many
readers are added in another order; steps' gradients are sums that cancel."""

REFUSED = 'cuda_graph: '


@dataclass
class Statistics:
    """What the operations of torch need instead of mean and variance."""

    weight: Tensor
    bias: Tensor
    eps: float


def batch_statistics(z, weight, bias, mean, var, momentum, eps):
    """Only updates the running ones."""
    F.batch_norm(z, mean, var, weight, bias, True, momentum, eps)
    return Statistics(weight, bias, eps)


def normalise(z, norm, identity, bound):
    """In separate operations, like the next two."""
    x = F.batch_norm(
        z, None, None, norm.weight, norm.bias, True, 0.0, norm.eps
    )
    x = x if identity is None else x + identity
    if bound is None:
        return x
    return F.relu(x) if bound == inf else F.hardtanh(x, 0.0, bound)


def normalise_quantize(z, norm, bound, step, qmin, qmax, grad_scale):
    x = normalise(z, norm, None, bound)
    return learned_step_quantize(x, step, qmin, qmax, grad_scale=grad_scale)


def norm_add_relu_quantize(
    z, norm, identity, bound, step, qmin, qmax, grad_scale
):
    x = normalise(z, norm, identity, bound)
    return (
        x,
        x,
        learned_step_quantize(x, step, qmin, qmax, grad_scale=grad_scale),
    )


def can_normalise(z, weight, bias):
    """Also in other layouts and dtypes than the kernels take."""
    return z.dim() == 4 and weight is not None and bias is not None


def stand_ins():
    """In the place of the kernels."""
    ours = (can_normalise, batch_statistics, normalise, normalise_quantize,
            norm_add_relu_quantize)  # fmt: skip
    return mock.patch.multiple(chains, **{f.__name__: f for f in ours})


@dataclass
class Row:
    """What was found for a config.

    Args:
        config: Its name.
        equal: To the bit.
        reason: Why not.
        error: The largest of a tensor, relative to it.
        kinds: How many chains of each kind.
        seconds: Wall time.
    """

    config: str
    equal: bool = False
    reason: str = ''
    error: float | None = None
    kinds: dict | None = None
    seconds: float = 0.0


def build(config: str) -> tuple[JointQAT, tuple]:
    """(model in training mode, shape of an image)."""
    row = CoverageRow(config)
    torch.manual_seed(0)
    model = networks.build(networks.prepare(row), row)
    model.init_weights()
    shape = networks.small_shape(model)
    return model.train(), shape


def train(model: JointQAT, shape: tuple, steps: int) -> dict:
    """Losses, gradients and buffers of the last step."""
    for step in range(steps):
        model.zero_grad()
        torch.manual_seed(step)
        random.seed(step)
        np.random.seed(step)  # mixed images
        data = networks.batch(model, shape, IMAGES)
        # RevViT seeds its dropout with what comes from the clock
        with mock.patch.object(torch, 'seed', return_value=step):
            losses = model(**data, mode='loss')
            sum(v for k, v in losses.items() if 'loss' in k).backward()
    found = {k: v.detach() for k, v in losses.items()}
    found |= {n: p.grad for n, p in model.named_parameters()}
    return found | dict(model.named_buffers())


def chained(config: str) -> tuple[dict, dict, JointQAT]:
    """What steps give as ever, and in chains, without kernels."""
    results = []
    for wanted in (False, True):
        model, shape = build(config)
        if not wanted:
            model.step.fused_norms.fusions = {}
        at = 'mmauxq.accelerate.step.'
        with (
            stand_ins(),
            mock.patch(at + 'is_forced', lambda: True),
            mock.patch(at + 'has_kernels', lambda x: True),
            use_form('reference'),
        ):
            results.append(train(model, shape, 2))
    return *results, model


def recorded(config: str) -> tuple[dict, dict, JointQAT]:
    """What steps give launched one by one, and recorded; on a GPU."""
    results = []
    for wanted in (False, True):
        model, shape = build(config)
        model = model.cuda().to(memory_format=torch.channels_last)
        model.step.channels_last = True
        model.step.recorded = (
            GraphedStep(model.step._fused, model)
            if wanted
            else model.step._fused
        )
        with torch.backends.cudnn.flags(benchmark=False, deterministic=True):
            results.append(train(model, shape, 5))
    if model.step.recorded.recording is None:
        raise RuntimeError('nothing was recorded')
    return *results, model


def relative_error(found: Tensor, expected: Tensor) -> float:
    """0 only if equal to the bit."""
    if torch.equal(found, expected):
        return 0.0
    scale = expected.double().norm().item()
    return (found.double() - expected.double()).norm().item() / (scale or 1.0)


def check(config: str, on_gpu: bool = False) -> Row:
    """One line."""
    row, start = Row(config), time.monotonic()
    try:
        plain, found, model = (recorded if on_gpu else chained)(config)
        kinds = [
            link.kind + '+quantize' * link.quantized
            for link in (model.step.fused_norms.fusions or {}).values()
        ]
        row.kinds = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
        errors = {
            name: relative_error(found[name], value)
            for name, value in plain.items()
            if value is not None
        }
        apart = {name: error for name, error in errors.items() if error}
        row.error, row.equal = max(errors.values()), not apart
        if apart:
            worst = max(apart, key=apart.__getitem__)
            row.reason = f'{len(apart)} of {len(errors)} differ, most {worst}'
    except Exception as error:
        row.reason = one_line(error, 300)
    row.seconds = round(time.monotonic() - start, 1)
    return row


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('configs', nargs='*')
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--recorded', action='store_true')
    args = parser.parse_args()
    names = args.configs or [
        json.loads(line)['config']
        for line in (ROOT / 'docs/logs/backbones.jsonl').open()
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / 'chains.jsonl'
    log.unlink(missing_ok=True)

    def note(row: Row) -> None:
        words = asdict(row) if isinstance(row, Row) else vars(row)
        with log.open('a') as file:
            file.write(json.dumps(words) + '\n')
        print(words['config'], words.get('equal'), words.get('error'),
              words['reason'], words.get('kinds'), flush=True)  # fmt: skip

    rows = sweep(
        names, check, args.jobs, 900.0, on_row=note, on_gpu=args.recorded
    )
    good = sum(getattr(row, 'equal', False) for row in rows)
    # as with RevViT, which seeds: such a step must not be played
    refused = [row for row in rows if REFUSED in row.reason]
    errors = [getattr(r, 'error', None) for r in rows if r not in refused]
    failed = sum(error is None or error > ALLOWED for error in errors)
    print(
        f'{good} of {len(rows)} equal to the bit, {len(refused)} refused by '
        f'cuda_graph in one line, {failed} failed'
    )
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
