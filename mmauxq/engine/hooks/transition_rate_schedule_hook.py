import math
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor, nn
from torch.optim import Optimizer

from mmauxq.errors import UsageError, check_number
from mmauxq.registry import HOOKS

from ..running import bare_model, only_optimizer
from ..training_state import Checked
from .transition_rate_hook import changed, codes_of, weights_with_codes

NAME = 'TransitionRateScheduleHook'
STATE = 'transition_rates'
"""Entry of a checkpoint for the state of the schedule."""


class TransitionRateSchedule:
    r"""Steps of the weights such that a given part of their codes changes.

    A learning rate does not tell how many codes a step changes: near the end,
    weights lie close to where their code changes, and it goes back and forth
    however small the rate is. Here the part that changes is given,
    :math:`R^t`, and each quantized layer finds the size of its steps
    :math:`U^t` by itself:

    .. math::
        k^t = \text{mean}(q^t \ne q^{t-1}) \qquad
        K^t = m K^{t-1} + (1 - m) k^t

        U^t = \max(0, U^{t-1} + \eta (R^t - K^t)) \qquad
        w^{t+1} = w^t - U^t g^t

    with the codes :math:`q` of its weights :math:`w`, and :math:`g` the
    direction of the optimizer, whichever it is (its step at a learning rate
    of 1, with momentum and weight decay). :math:`U^0` is the learning rate
    that the weight had at first, :math:`K^0 = R^0`, and :math:`\eta = c\,U^0 /
    R^0`. All other parameters have the learning rate of their group.

    Everything stays on the device; nothing waits for it.

    Source: Lee et al., Scheduling Weight Transitions for Quantization-Aware
    Training, arXiv:2404.19248. The gain c is ours.

    Attributes:
        rates: :math:`K` of each layer, (L,).
        step_sizes: :math:`U` of each layer, (L,).

    Args:
        model: With quantized layers.
        optimizer: Of its parameters; its step is proportional to ``lr``.
        rate: :math:`R^0`, in (0, 1].
        gain: c; at twice the rate that is aimed at, U falls to 0 in ``1 / c``
            steps.
        momentum: m, from 0, below 1.
        train_steps: Whether the steps of the weights' quantizers are trained;
            a moving step changes codes by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rate: float,
        gain: float,
        momentum: float,
        train_steps: bool,
    ) -> None:
        self.rate, self.momentum = rate, momentum
        self.progress = 0.0
        rate_of = {
            parameter: float(group.get('initial_lr', group['lr']))
            for group in optimizer.param_groups
            for parameter in group['params']
        }
        self.layers = weights_with_codes(model, NAME)
        self.weights = [w for w, _ in self.layers.values()]
        missing = [n for n, (w, _) in self.layers.items() if w not in rate_of]
        if missing:
            raise UsageError(
                f'{NAME}: expected an optimizer of all quantized weights, got '
                f'one without that of {missing[0]}'
            )
        self.fixed = {
            parameter
            for _, quantizer in self.layers.values()
            for parameter in quantizer.parameters()
            if not train_steps
        }
        first = self.weights[0]
        self.start = torch.tensor(
            [rate_of[w] for w in self.weights],
            device=first.device,
            dtype=torch.promote_types(first.dtype, torch.float32),
        )
        self.sizes = self.start.new_tensor([w.numel() for w in self.weights])
        self.eta = self.start * (gain / rate)
        self.step_sizes = self.start.clone()
        self._sizes_apart = self.step_sizes.unbind()  # of the same memory
        self.rates = torch.full_like(self.start, rate)
        self.last = self.rates
        self.before = [torch.empty_like(w) for w in self.weights]
        self.codes: list[Tensor] = []
        weights, aside = set(self.weights), self.fixed.union(self.weights)
        self._parts = [
            (
                [p for p in group['params'] if p not in aside],
                [p for p in group['params'] if p in weights],
            )
            for group in optimizer.param_groups
        ]
        self._groups: list[tuple[dict, list[dict]]] = []
        self._depth = 0
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @property
    def target(self) -> float:
        """:math:`R^t`: a cosine from :math:`R^0` to 0."""
        return self.rate * (1 + math.cos(math.pi * self.progress)) / 2

    # Not by learning rates of groups: a tensor for each layer would take a
    # group, and its kernels, for each; those of a checkpoint and of schedulers
    # would be others; and some optimizers would ask the GPU for the number.
    # So the optimizer runs at a learning rate of 1, and what it did is scaled.
    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *step: Any) -> None:
        self._depth += 1
        if self._depth > 1:  # a subclass calls the step of its base
            return
        if not self.codes:
            self.codes = codes_of(self.layers)
        torch._foreach_copy_(self.before, self.weights)
        self._groups = [
            (
                group,
                [dict(group, params=rest), dict(group, params=own, lr=1.0)],
            )
            for group, (rest, own) in zip(
                optimizer.param_groups, self._parts, strict=True
            )
        ]
        optimizer.param_groups[:] = [
            part
            for _, parts in self._groups
            for part in parts
            if part['params']
        ]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *step: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        for group, parts in self._groups:
            for part in parts:  # an optimizer may count its steps there
                if part['params']:
                    group |= part | dict(
                        params=group['params'], lr=group['lr']
                    )
        optimizer.param_groups[:] = [group for group, _ in self._groups]
        torch._foreach_sub_(self.weights, self.before)
        torch._foreach_mul_(self.weights, self._sizes_apart)
        torch._foreach_add_(self.weights, self.before)
        before, self.codes = self.codes, codes_of(self.layers)
        self.last = (changed(self.codes, before) / self.sizes).to(self.rates)
        self.rates.lerp_(self.last, 1 - self.momentum)
        missing = self.target - self.rates
        self.step_sizes.addcmul_(self.eta, missing).clamp_min_(0)

    def state_dict(self) -> dict[str, Tensor]:
        """Rates and sizes of steps, copied, in the order of layers."""
        return dict(
            rates=self.rates.clone(), step_sizes=self.step_sizes.clone()
        )

    def load_state_dict(self, state: Any, source: str) -> None:
        """Go on from :meth:`state_dict`; a UsageError that names ``source``
        if it is that of another network."""
        check = Checked(source)
        state = check.mapping(STATE, state)
        for name in ('rates', 'step_sizes'):
            own = getattr(self, name)
            place = f'{STATE}.{name}'
            own.copy_(check.tensor(place, state.get(name), own.shape))


@HOOKS.register_module()
class TransitionRateScheduleHook(Hook):
    """Trains weights with :class:`TransitionRateSchedule`.

    The part of integer codes that a step changes follows a cosine from
    ``rate`` to 0; the learning rate and its schedule are those of all other
    parameters. ``transition_rate`` in the log is that part, the mean over the
    layers; ``transition_rate_target`` is what it is to be.

    Args:
        rate: At the beginning, above 0, up to 1. That of training without
            this hook is told by ``mmauxq.TransitionRateHook`` with
            ``interval=1``.
        gain: How quickly the size of a step follows, above 0.
        momentum: Of the running rate, from 0, below 1.
        train_steps: Whether the weights' scales are trained, too.

    Raises:
        UsageError: If an argument is out of its range, the model has no
            quantized weight, or there are several optimizers.
    """

    def __init__(
        self,
        rate: float = 0.005,
        gain: float = 0.03,
        momentum: float = 0.9,
        train_steps: bool = False,
    ) -> None:
        for name, value, expected, fits in (
            ('rate', rate, 'a number above 0, up to 1', lambda x: 0 < x <= 1),
            ('gain', gain, 'a number above 0', lambda x: 0 < x < math.inf),
            ('momentum', momentum, '0 <= m < 1', lambda x: 0 <= x < 1),
        ):
            check_number(f'{NAME}: {name}', value, expected, fits)
        if type(train_steps) is not bool:
            raise UsageError(
                f'{NAME}: train_steps: expected True or False, got '
                f'{train_steps!r}'
            )
        self.settings = rate, gain, momentum, train_steps

    # not before_train: what the checkpoint holds has a place by then, and
    # FiniteNumbersHook sees the parameters that are stepped
    def before_run(self, runner: Any) -> None:
        optimizer = only_optimizer(runner, NAME)
        if optimizer is None:
            return  # a test
        self.schedule = TransitionRateSchedule(
            bare_model(runner), optimizer, *self.settings
        )

    def before_train_iter(self, runner: Any, *step: Any, **more: Any) -> None:
        self.schedule.progress = runner.iter / runner.max_iters

    def after_train_iter(self, runner: Any, *step: Any, **more: Any) -> None:
        update, schedule = runner.message_hub.update_scalar, self.schedule
        update('train/transition_rate', schedule.last.mean())
        update('train/transition_rate_target', schedule.target)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint[STATE] = self.schedule.state_dict()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if runner._resume and STATE in checkpoint:
            source = str(runner._load_from)
            self.schedule.load_state_dict(checkpoint[STATE], source)
