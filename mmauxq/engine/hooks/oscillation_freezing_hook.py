import math
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor, nn
from torch.optim import Optimizer

from mmauxq.errors import UsageError, check_number
from mmauxq.quantizers import LearnedStepQuantizer
from mmauxq.registry import HOOKS

from ..running import bare_model, only_optimizer
from ..training_state import Checked
from .transition_rate_hook import codes_of, steps_of, weights_with_codes
from .transition_rate_schedule_hook import TransitionRateScheduleHook

NAME = 'OscillationFreezingHook'
STATE = 'oscillations'
"""Entry of a checkpoint for what is known of the weights."""
KEPT = 'frequencies', 'means', 'directions', 'frozen'
"""Attributes that stand there."""


class OscillationFreezing:
    r"""Weights whose code goes back and forth are held at one code.

    A weight that lies close to where its code changes crosses that place
    again and again, and disturbs statistics and other weights while it learns
    nothing. With the codes :math:`q` of the weights after a step,

    .. math::
        f^t = m f^{t-1} + (1 - m) o^t \qquad
        \bar q^t = m \bar q^{t-1} + (1 - m) q^t

    where :math:`o^t` is 1 if the step changed the code, and in the other
    direction than the change before, else 0. From the first step on in which
    :math:`f^t > \theta^t`, the code of the weight is
    :math:`\text{round}(\bar q^t)`: after each step, the weight is set to
    this code times the scale, which may still be trained. At first
    :math:`f^0 = 0` and :math:`\bar q^0 = q^0`.

    The value of a code is in the middle of what is rounded to it, so that no
    error of arithmetic gives another code. Everything stays on the device;
    nothing waits for it.

    Source: Nagel et al., Overcoming Oscillations in Quantization-Aware
    Training, arXiv:2203.11086.

    Attributes:
        frequencies: :math:`f` of all N weights, in the order of layers, (N,).
        means: :math:`\bar q`, or the code of a frozen weight, (N,).
        directions: Of the last change of a code, -1 or 1; 0 before, (N,).
        frozen: Which weights are frozen, (N,).

    Args:
        model: With quantized layers, whose steps are learned.
        optimizer: Of its parameters.
        start: :math:`\theta` at the beginning, in (0, 1].
        end: :math:`\theta` at the end, above 0, up to ``start``.
        momentum: m, from 0, below 1.

    Raises:
        UsageError: If a weight has another kind of quantizer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        start: float,
        end: float,
        momentum: float,
    ) -> None:
        self.start, self.end, self.momentum = start, end, momentum
        self.progress = 0.0
        self.layers = weights_with_codes(model, NAME)
        for name, (_, quantizer) in self.layers.items():
            learned = isinstance(quantizer, LearnedStepQuantizer)
            if not learned or quantizer.offset is not None:
                raise UsageError(
                    f'{NAME}: {name}: expected a quantizer with a learned '
                    'step, so that a weight can be set to its code, got '
                    f'{type(quantizer).__name__}; mmauxq.LSQ and '
                    'mmauxq.LSQPlus are such (mmauxq.LearnedStepQuantizer)'
                )
        weights = [w for w, _ in self.layers.values()]
        sizes = [w.numel() for w in weights]
        self.codes = torch.empty(0)
        self.means = torch.zeros(
            sum(sizes),
            device=weights[0].device,
            dtype=torch.promote_types(weights[0].dtype, torch.float32),
        )
        self.frequencies = torch.zeros_like(self.means)
        self.directions = torch.zeros_like(self.means, dtype=torch.int8)
        self.frozen = torch.zeros_like(self.means, dtype=torch.bool)
        # of the same memory
        parts = self.means.split(sizes), self.frozen.split(sizes)
        self._means_apart, self._frozen_apart = (
            [part.view(w.shape) for part, w in zip(each, weights, strict=True)]
            for each in parts
        )
        self.started = False
        self._depth = 0
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @property
    def threshold(self) -> float:
        r""":math:`\theta^t`: a cosine from ``start`` to ``end``."""
        part = (1 + math.cos(math.pi * self.progress)) / 2
        return self.end + (self.start - self.end) * part

    @property
    def oscillating(self) -> Tensor:
        """Which weights would be frozen at the last threshold, and are not
        yet, (N,)."""
        return (self.frequencies > self.end) & ~self.frozen

    def _codes(self) -> Tensor:
        """Of all weights; frozen ones may have moved, but have theirs."""
        codes = torch.cat([c.flatten() for c in codes_of(self.layers)])
        return torch.where(self.frozen, self.means, codes.to(self.means))

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *step: Any) -> None:
        self._depth += 1
        if not len(self.codes):  # calibrated by now
            self.codes = self._codes()
        if not self.started:
            self.means.copy_(self.codes)
            self.started = True

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *step: Any) -> None:
        self._depth -= 1
        if self._depth:  # a subclass calls the step of its base
            return
        codes, new = self._codes(), 1 - self.momentum
        changes = (codes - self.codes).sign_().to(torch.int8)
        turned = changes * self.directions < 0
        self.frequencies.lerp_(turned.to(self.frequencies), new)
        self.means.lerp_(codes, new)  # equal if frozen, and so they stay
        self.directions = torch.where(changes == 0, self.directions, changes)
        self.frozen |= self.frequencies > self.threshold
        # those of weights that were frozen before are integers
        self.means.copy_(
            torch.where(self.frozen, self.means.round(), self.means)
        )
        self.codes = torch.where(self.frozen, self.means, codes)
        values = torch._foreach_mul(self._means_apart, steps_of(self.layers))
        for value, frozen, (weight, _) in zip(
            values, self._frozen_apart, self.layers.values(), strict=True
        ):
            torch.where(frozen, value.to(weight), weight, out=weight)

    def state_dict(self) -> dict[str, Tensor]:
        """What is known of all weights, copied; empty before a step."""
        if not self.started:
            return {}
        return {name: getattr(self, name).clone() for name in KEPT}

    def load_state_dict(self, state: Any, source: str) -> None:
        """Go on from :meth:`state_dict`; a UsageError that names ``source``
        if it is that of another network."""
        check = Checked(source)
        state = check.mapping(STATE, state)
        if not state:
            return
        for name in KEPT:
            own, place = getattr(self, name), f'{STATE}.{name}'
            own.copy_(check.tensor(place, state.get(name), own.shape))
        self.started, self.codes = True, self.codes[:0]


@HOOKS.register_module()
class OscillationFreezingHook(Hook):
    """Trains weights with :class:`OscillationFreezing`.

    A weight is frozen at an integer code once the running part of steps that
    turn its code back is above a threshold, which falls from ``start`` to
    ``end`` as a cosine. ``frozen`` in the log is the part of quantized weights
    that are frozen, 0 to 1; ``oscillating`` is the part of those that are not,
    but would be at the last threshold.

    Args:
        start: Threshold at the beginning, above 0, up to 1.
        end: At the end, above 0, up to ``start``.
        momentum: Of the running part and of the running mean of codes, from
            0, below 1.

    Raises:
        UsageError: If an argument is out of its range, the model has no
            quantized weight or one whose step is not learned, there are
            several optimizers, or ``mmauxq.TransitionRateScheduleHook`` is
            there, too.
    """

    def __init__(
        self, start: float = 0.1, end: float = 0.01, momentum: float = 0.99
    ) -> None:
        above = 'a number above 0, up to'
        for name, value, expected, fits in (
            ('start', start, f'{above} 1', lambda x: 0 < x <= 1),
            ('end', end, f'{above} start', lambda x: 0 < x <= start),
            ('momentum', momentum, '0 <= m < 1', lambda x: 0 <= x < 1),
        ):
            check_number(f'{NAME}: {name}', value, expected, fits)
        self.settings = start, end, momentum

    # not before_train: what the checkpoint holds has a place by then
    def before_run(self, runner: Any) -> None:
        optimizer = only_optimizer(runner, NAME)
        if optimizer is None:
            return  # a test
        kinds = [type(hook) for hook in runner.hooks]
        if TransitionRateScheduleHook in kinds:
            raise UsageError(
                f'{NAME}: expected no TransitionRateScheduleHook beside it, '
                'got one; both decide which codes change: remove one of them'
            )
        self.freezing = OscillationFreezing(
            bare_model(runner), optimizer, *self.settings
        )

    def before_train_iter(self, runner: Any, *step: Any, **more: Any) -> None:
        self.freezing.progress = runner.iter / runner.max_iters

    def after_train_iter(self, runner: Any, *step: Any, **more: Any) -> None:
        update, freezing = runner.message_hub.update_scalar, self.freezing
        for name in ('frozen', 'oscillating'):
            update(f'train/{name}', getattr(freezing, name).float().mean())

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint[STATE] = self.freezing.state_dict()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if runner._resume and STATE in checkpoint:
            source = str(runner._load_from)
            self.freezing.load_state_dict(checkpoint[STATE], source)
