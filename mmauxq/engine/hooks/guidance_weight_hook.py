"""The weight of the guidance's losses over the course of training."""

import math
from typing import Any

from mmengine.hooks import Hook

from mmauxq.errors import UsageError
from mmauxq.registry import HOOKS

from ..running import bare_model

SHAPES = {
    'constant': lambda t: 0.0,
    'linear': lambda t: t,
    'cosine': lambda t: (1 - math.cos(math.pi * t)) / 2,
}


@HOOKS.register_module()
class GuidanceWeightHook(Hook):
    """Moves ``guidance.loss_weight`` from its configured value to another.

    The weight is a function of the iteration alone, so that a resumed run
    goes on where it was. It is logged as ``guidance/weight``; that of one of
    several guidances as ``guidance.0/weight``.

    Args:
        end_weight: Weight at the end, from 0.
        begin: Part of the training, 0 to 1, at which the change begins.
        end: Part at which it is complete, above ``begin``, up to 1.
        shape: ``'linear'``, ``'cosine'`` or ``'constant'``.
        index: Place in the list of guidances, from 0; to be given if there
            are several.

    Raises:
        UsageError: If an argument is out of its range.
    """

    priority = 'NORMAL'

    def __init__(
        self,
        end_weight: float = 0.0,
        begin: float = 0.0,
        end: float = 1.0,
        shape: str = 'cosine',
        index: int | None = None,
    ) -> None:
        numbers = dict(end_weight=end_weight, begin=begin, end=end)
        for name, value in numbers.items():
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise UsageError(
                    f'GuidanceWeightHook: {name}: expected a finite number '
                    f'from 0, got {value!r}'
                )
        if not begin < end <= 1:
            raise UsageError(
                'GuidanceWeightHook: expected 0 <= begin < end <= 1, got '
                f'begin={begin}, end={end}'
            )
        if not isinstance(shape, str) or shape not in SHAPES:
            raise UsageError(
                f'GuidanceWeightHook: shape: expected one of '
                f'{", ".join(SHAPES)}, got {shape!r}'
            )
        self.end_weight, self.begin, self.end = end_weight, begin, end
        self.shape = SHAPES[shape]
        self.index = index
        self.start_weight: float | None = None

    def before_train(self, runner: Any) -> None:
        """Remember the configured weight."""
        self.start_weight = float(self._guidance(runner).loss_weight)

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Set the weight of this iteration."""
        weight = self.weight(runner.iter / max(runner.max_iters, 1))
        self._guidance(runner).loss_weight.fill_(weight)
        name = 'guidance' if self.index is None else f'guidance.{self.index}'
        runner.message_hub.update_scalar(f'train/{name}/weight', weight)

    def weight(self, progress: float) -> float:
        """The weight at a part of the training, 0 to 1."""
        t = (progress - self.begin) / (self.end - self.begin)
        moved = self.shape(min(max(t, 0.0), 1.0))
        return (
            self.start_weight + (self.end_weight - self.start_weight) * moved
        )

    def _guidance(self, runner: Any) -> Any:
        guidances = getattr(bare_model(runner), 'guidances', [])
        if not guidances:
            raise UsageError(
                'GuidanceWeightHook: the model has no guidance whose weight '
                'could change; remove the hook or set model.guidance'
            )
        if self.index is None and len(guidances) == 1:
            return guidances[0]
        if self.index not in range(len(guidances)):
            raise UsageError(
                'GuidanceWeightHook: index: expected 0 to '
                f'{len(guidances) - 1}, the guidances of the model, got '
                f'{self.index!r}'
            )
        return guidances[self.index]
