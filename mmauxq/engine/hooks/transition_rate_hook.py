from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor, nn

from mmauxq.errors import UsageError, check_integer
from mmauxq.layers import QuantLayer, QuantMultiheadAttention
from mmauxq.log import log
from mmauxq.quantizers import FLOAT_BITS, LearnedStepQuantizer, Quantizer
from mmauxq.quantizers.functional import MIN_SCALE
from mmauxq.registry import HOOKS

from ..running import bare_model

Weights = dict[str, tuple[nn.Parameter, Quantizer]]


def weights_with_codes(model: nn.Module, asks: str) -> Weights:
    """Name of a layer -> its weight and the quantizer of it.

    Only trained weights that reach the quantizer as they are have codes of
    their own. A layer with a forward of another package may change its weight
    before the product; such layers are left out, and named in the log.

    Args:
        model: An algorithm or a network, with quantized layers.
        asks: Who wants to know, for messages.

    Raises:
        UsageError: If there is no such weight.
    """
    found: Weights = {}
    others = []
    # a teacher may be quantized, too
    network = getattr(model, 'architecture', model)
    for name, layer in network.named_modules():
        quantizer = getattr(layer, 'weight_quantizer', None)
        if (
            not isinstance(layer, QuantLayer)
            or not isinstance(quantizer, Quantizer)
            or quantizer.bits == FLOAT_BITS
            or not layer.product_weight.requires_grad
            or any(layer.product_weight is w for w, _ in found.values())
        ):
            continue
        if layer.multiplies_by_weight or isinstance(
            layer, QuantMultiheadAttention
        ):
            found[name] = layer.product_weight, quantizer
        else:
            others.append(name)
    if not found:
        raise UsageError(
            f'{asks}: expected a model with quantized weights that are '
            'trained, got none; remove the hook or set model.quantizers'
        )
    if others:
        log(
            f'{asks}: left out are {len(others)} layers with a forward of '
            f'their own: {", ".join(others)}'
        )
    return found


@torch.no_grad()
def codes_of(weights: Weights) -> list[Tensor]:
    """The integer codes of each weight, in its dtype or float32; nothing waits
    for a GPU. Learned steps take a handful of launches for all layers."""
    if not all(
        isinstance(q, LearnedStepQuantizer)
        and q.offset is None
        and w.dtype == q.step.dtype
        for w, q in weights.values()
    ):
        return [_codes(w, q) for w, q in weights.values()]
    tensors = [w for w, _ in weights.values()]
    each: Any = [q for _, q in weights.values()]
    codes = torch._foreach_div(tensors, steps_of(weights))
    torch._foreach_round_(codes)
    torch._foreach_clamp_min_(codes, [float(q.qmin) for q in each])
    torch._foreach_clamp_max_(codes, [float(q.qmax) for q in each])
    return list(codes)


def steps_of(weights: Weights) -> list[Tensor]:
    """The learned step of each weight, in a shape that broadcasts to it."""
    each: Any = [q for _, q in weights.values()]
    steps = torch._foreach_clamp_min([q.step for q in each], MIN_SCALE)
    pairs = zip(weights.values(), steps, strict=True)
    return [q.broadcast(step, w) for (w, q), step in pairs]


def _codes(weight: Tensor, quantizer: Quantizer) -> Tensor:
    """On the levels of the last training step, which stay."""
    training = quantizer.training
    codes = quantizer.eval().codes(weight).float()
    quantizer.train(training)
    return codes


def changed(codes: list[Tensor], before: list[Tensor]) -> Tensor:
    """How many codes of each weight differ from ``before``, (L,)."""
    distances = torch._foreach_sub(codes, before)
    torch._foreach_abs_(distances)
    torch._foreach_clamp_max_(distances, 1.0)
    return torch.stack(torch._foreach_norm(distances, 1))


@HOOKS.register_module()
class TransitionRateHook(Hook):
    """Tells how many weights have another integer code than a while ago.

    It shows whether a low-bit network still learns: a code that left and came
    back does not count. ``codes_changed`` in the log is the part of all codes,
    0 to 1; each epoch has a line with the layer that changed most.

    Args:
        interval: Compare codes every so many steps, by default at the end of
            each epoch; nothing is done in the steps between. With 1 the part
            is the transition rate of ``mmauxq.TransitionRateScheduleHook``.

    Raises:
        UsageError: If ``interval`` is no integer from 1, or the model has no
            quantized weight.
    """

    def __init__(self, interval: int | None = None) -> None:
        if interval is not None:
            check_integer('TransitionRateHook: interval', interval, 1)
        self.interval = interval

    def before_train(self, runner: Any) -> None:
        model = bare_model(runner)
        self.weights = weights_with_codes(model, 'TransitionRateHook')
        self.sizes = [w.numel() for w, _ in self.weights.values()]
        self.codes: list[Tensor] = []

    def after_train_iter(self, runner: Any, *step: Any, **more: Any) -> None:
        if not self.codes:  # the first step calibrates
            self.codes = codes_of(self.weights)
        elif self.interval and self.every_n_train_iters(runner, self.interval):
            self._compare(runner)

    def after_train_epoch(self, runner: Any) -> None:
        if self.interval or not self.codes:
            return
        counts = self._compare(runner).tolist()
        parts = [n / size for n, size in zip(counts, self.sizes, strict=True)]
        most, name = max(zip(parts, self.weights, strict=True))
        log(
            f'{sum(counts) / sum(self.sizes):.2%} of the weights have another '
            f'code than an epoch ago, most in {name} ({most:.2%})'
        )

    def _compare(self, runner: Any) -> Tensor:
        """How many codes of each weight changed since the last call."""
        before, self.codes = self.codes, codes_of(self.weights)
        counts = changed(self.codes, before)
        runner.message_hub.update_scalar(
            'train/codes_changed', counts.sum() / sum(self.sizes)
        )
        return counts
