import math
from typing import Any

from mmengine.hooks import Hook

from mmauxq.errors import UsageError, check_choice
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
        index: Place in the list of guidances, from 0; needed if there are
            several.

    Raises:
        UsageError: If an argument is out of its range.
    """

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
        check_choice('GuidanceWeightHook: shape', shape, SHAPES)
        self.end_weight, self.begin, self.end = end_weight, begin, end
        self.shape, self.index = SHAPES[shape], index

    def before_train(self, runner: Any) -> None:
        self.start_weight = float(self._guidance(runner).loss_weight)

    def before_train_iter(self, runner: Any, *step: Any, **more: Any) -> None:
        weight = self.weight(runner.iter / runner.max_iters)
        self._guidance(runner).loss_weight.fill_(weight)
        name = 'guidance' if self.index is None else f'guidance.{self.index}'
        runner.message_hub.update_scalar(f'train/{name}/weight', weight)

    def weight(self, progress: float) -> float:
        """The weight at a part of the training, 0 to 1."""
        t = (progress - self.begin) / (self.end - self.begin)
        moved = self.shape(min(max(t, 0.0), 1.0))
        start = self.start_weight
        return start + (self.end_weight - start) * moved

    def _guidance(self, runner: Any) -> Any:
        guidances = getattr(bare_model(runner), 'guidances', [])
        if not guidances:
            raise UsageError(
                'GuidanceWeightHook: the model has no guidance whose weight '
                'could change; remove the hook or set model.guidance'
            )
        index = self.index
        if index is None and len(guidances) == 1:
            index = 0
        if index not in range(len(guidances)):
            raise UsageError(
                'GuidanceWeightHook: index: expected 0 to '
                f'{len(guidances) - 1}, the guidances of the model, got '
                f'{index!r}'
            )
        return guidances[index]
