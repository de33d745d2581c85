from contextlib import ExitStack
from typing import Any

from mmengine.hooks import Hook
from torch import Tensor

from mmauxq.forward_hooks import forward_hooks
from mmauxq.log import warn
from mmauxq.quantizers import (
    keep_positive,
    learned_scales,
    named_quantizers,
)
from mmauxq.registry import HOOKS

from ..running import bare_model

DEAD = 'mmauxq/dead_quantizers'


@HOOKS.register_module()
class QuantizerWatchHook(Hook):
    """Keeps learned scales positive, and names dead quantizers.

    After each step, scales that moved to zero or below are set to the least
    positive one. In each validation, quantizers whose output is one value for
    the whole first batch, whatever the input, are named in the log and in the
    message hub (``mmauxq/dead_quantizers``).
    """

    # before an average (EMA) or a checkpoint sees the scales
    priority = 'ABOVE_NORMAL'

    def before_train(self, runner: Any) -> None:
        self.scales = learned_scales(bare_model(runner))

    def after_train_iter(self, runner: Any, *step: Any, **more: Any) -> None:
        keep_positive(self.scales)

    def before_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        if batch_idx:
            return
        self._alive: dict[str, bool] = {}
        self._watch = ExitStack()

        def watch(name: str, module: Any, x: Any, output: Tensor) -> None:
            low, high = output.aminmax()
            self._alive[name] = self._alive.get(name) or bool(low < high)

        self._watch.enter_context(
            forward_hooks(named_quantizers(bare_model(runner)), watch)
        )

    def after_val_iter(
        self, runner: Any, batch_idx: int, *step: Any, **more: Any
    ) -> None:
        if batch_idx:
            return
        self._watch.close()
        dead = [name for name, alive in self._alive.items() if not alive]
        runner.message_hub.update_info(DEAD, dead)
        if dead:
            warn(
                f'{len(dead)} of {len(self._alive)} quantizers are dead, '
                f'they give one value only: {", ".join(dead[:10])}'
                + ', ...'
                * bool(dead[10:])
            )
