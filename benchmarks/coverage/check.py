"""Whether the three lines of config are enough for one network, and why not.

The recipe is read and checked as ``mmauxq train`` does. F and H are built from
it and trained for two steps on random images; everything that the package
promises for them is checked.
"""

import copy
import random
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmauxq.algorithms import JointQAT
from mmauxq.analysis import count_levels
from mmauxq.errors import one_line
from mmauxq.layers import QuantLayer, restore
from mmauxq.network import sample_images
from mmauxq.network.profile import count_parameters as parameters_of
from mmauxq.network.profile import floating
from mmauxq.quantizers import named_quantizers

from .build import (
    batch,
    build,
    build_small,
    float_of,
    prepare,
    settings,
    small_shape,
)
from .command import BATCH, STEPS, train
from .configs import WIDTH, NetworkError, NoRandomFill, linear_head, recipe
from .row import Row

LEARNING_RATE = 1e-3


class CheckError(Exception):
    """Something that is promised does not hold; says what."""


def count_parameters(config: str) -> Row:
    """The size of the float network, nothing else.

    Args:
        config: As of :func:`.configs.classifier_configs`.

    Returns:
        With the verdict ``'headless'`` if the config has no head.
    """
    row = Row(config)
    try:
        with NoRandomFill():
            head = linear_head(config)
            cfg = recipe(config, head)
            network = float_of(cfg)
        row.parameters = parameters_of(network) / 1e6
        row.verdict = 'headless' if head else 'pass'
    except Exception as error:
        row.reason = _reason(error)
    return row


def try_config(config: str, build_only: bool = False) -> Row:
    """Build F and H for a config, and see whether they train.

    Args:
        config: As of :func:`.configs.classifier_configs`.
        build_only: Build, and do not train.
    """
    row = Row(config)
    started = time.time()
    try:
        torch.manual_seed(0)
        with NoRandomFill() if build_only else nullcontext():
            cfg = prepare(row)
            model = build_small(cfg, row) if build_only else build(cfg, row)
        if not build_only:
            shape = small_shape(model)
            _check_training(cfg, model, row, shape)
            train(cfg, shape)
        row.verdict = 'pass'
    except Exception as error:
        if isinstance(error, NetworkError):
            row.verdict = 'mmpretrain'
        row.note(_reason(error))
        traceback.print_exc()
    row.seconds = time.time() - started
    return row


def _reason(error: Exception) -> str:
    if isinstance(error, (CheckError, NetworkError)):
        return str(error)
    return one_line(error, WIDTH)


def _check_training(
    cfg: Config, model: JointQAT, row: Row, shape: Sequence[int]
) -> None:
    """The checks that need training steps.

    Args:
        cfg: That of the model.
        model: As it was built; trained for two steps.
        row: Is told what was found.
        shape: (C, H, W) of the images.

    Raises:
        CheckError: If one of the checks does not hold.
    """
    random.seed(0)
    _check_conversion(model, shape)
    quantizers = dict(named_quantizers(model.architecture))
    negative: dict[str, bool] = {}

    def note_sign(name: str, _: nn.Module, args: tuple) -> None:
        negative.setdefault(name, bool(args[0].min() < 0))

    handles = [
        quantizer.register_forward_pre_hook(partial(note_sign, name))
        for name, quantizer in quantizers.items()
        if quantizer.role == 'activation'
    ]
    before = _train(model, shape)
    for handle in handles:
        handle.remove()
    still = [
        name
        for name, quantizer in quantizers.items()
        if torch.equal(quantizer.step, before[name])
    ]
    row.moved = (len(quantizers) - len(still), len(quantizers))
    if still:
        raise CheckError(
            f'{len(still)} of {len(quantizers)} learned scales did not move, '
            f'such as {still[0]}'
        )
    row.signed = (sum(negative.values()), len(negative))
    for name, sign in negative.items():
        if bool(quantizers[name].signed) != sign:
            raise CheckError(f'{name} has the wrong sign')
    _check_levels(model, shape)
    _check_dropping(model, cfg, shape)


def _train(model: JointQAT, shape: Sequence[int]) -> dict[str, Tensor]:
    """Two steps; returns the scales after the first forward pass."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE)
    scales: dict[str, Tensor] = {}
    for step in range(STEPS):
        torch.manual_seed(step)
        losses = model(**batch(model, shape), mode='loss')
        scales = scales or {
            name: quantizer.step.detach().clone()
            for name, quantizer in named_quantizers(model.architecture)
        }
        terms = {k: v for k, v in losses.items() if 'loss' in k}
        for name, value in terms.items():
            if not bool(torch.isfinite(value)):
                raise CheckError(f'step {step + 1}: {name} is not finite')
        for part in ('student.', 'guidance.'):
            if not any(name.startswith(part) for name in terms):
                raise CheckError(f'no loss {part}*')
        if step == STEPS - 1:
            _check_guidance_gradient(model, terms)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
    return scales


def _check_conversion(model: JointQAT, shape: Sequence[int]) -> None:
    """With idle quantizers F computes what the float network does."""
    network = model.architecture.eval()
    inputs = sample_images(network, shape, BATCH)
    with torch.no_grad(), floating(network):
        quantized = network(inputs, mode='tensor')
        floats = restore(copy.deepcopy(network))(inputs, mode='tensor')
    _check_close(
        quantized, floats, 'the conversion changes what F computes',
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def _check_close(
    actual: Any, expected: Any, message: str, rtol: float, atol: float
) -> None:
    try:
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    except AssertionError as error:
        raise CheckError(message) from error


def _check_guidance_gradient(model: JointQAT, terms: dict) -> None:
    """The losses of the guidance reach the first quantized layer."""
    modules = dict(model.architecture.named_modules(remove_duplicate=False))
    name = next(n for n in model.bits if isinstance(modules[n], QuantLayer))
    # of a frozen layer, only the scales are trained
    weight = modules[name].product_weight
    if not weight.requires_grad:
        weight = modules[name].input_quantizer.step
    # not autograd.grad: reversible networks write .grad in their backward
    model.zero_grad()
    sum(v for k, v in terms.items() if k.startswith('guidance.')).backward(
        retain_graph=True
    )
    gradient = weight.grad
    if gradient is None or not bool(gradient.abs().sum() > 0):
        raise CheckError(f'no gradient of the guidance reaches {name}')
    model.zero_grad()


def _check_levels(model: JointQAT, shape: Sequence[int]) -> None:
    """No quantized tensor has more values than its bits allow."""
    model.eval()
    inputs = torch.randn(BATCH, *shape)
    for count in count_levels(model.architecture, inputs):
        if not count.holds:
            raise CheckError(
                f'{count.name} holds {count.levels} values at {count.bits} bit'
            )


def _check_dropping(
    model: JointQAT, cfg: Config, shape: Sequence[int]
) -> None:
    """Without the guidance, F has the same parameters and logits."""
    plain = MODELS.build(dict(settings(cfg), guidance=None))
    state = model.state_dict()
    keys = plain.load_state_dict(
        {k: v for k, v in state.items() if not k.startswith('guidance.')},
        strict=False,
    )
    # some modules drop entries as they load, and make them anew
    dropped = plain.load_state_dict(plain.state_dict(), strict=False)
    missing = set(keys.missing_keys) - set(dropped.missing_keys)
    if missing or keys.unexpected_keys:
        raise CheckError('F has other parameters than without guidance')
    plain.eval()
    inputs = torch.randn(BATCH, *shape)
    with torch.no_grad():
        _check_close(
            model(inputs, mode='tensor'), plain(inputs, mode='tensor'),
            'F gives other logits without guidance', rtol=0, atol=0,
        )  # fmt: skip
