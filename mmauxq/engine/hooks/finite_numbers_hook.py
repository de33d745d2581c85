"""Training stops, or skips a step, where numbers are not finite."""

from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict
from torch import Tensor, nn
from torch.optim import Optimizer

from mmauxq.engine.diagnosis import bad_sample, first_bad_place, is_finite
from mmauxq.errors import TrainingError, UsageError
from mmauxq.registry import HOOKS

from ..running import bare_model

SKIPPED = 'mmauxq/skipped_steps'


@HOOKS.register_module()
class FiniteNumbersHook(Hook):
    """Sees that no step is made, and nothing saved, of NaN or infinity.

    Gradients are looked at before the optimizer uses them, losses after each
    step; the message names the step and the first layer where it appeared.
    A loss scaler (float16) skips steps of its own accord while it looks for
    its scale; those are left to it.

    Args:
        on_bad: ``'stop'`` ends the run with exit status 1. ``'skip'`` leaves
            the step out - parameters, optimizer and batch-norm statistics
            stay - and counts it (``mmauxq/skipped_steps`` in the message
            hub).
        most: How many steps in a row may be skipped before the run ends.

    Raises:
        UsageError: If an argument is out of its range.
    """

    # before anything is saved, logged or averaged
    priority = 'VERY_HIGH'

    def __init__(self, on_bad: str = 'stop', most: int = 10) -> None:
        if on_bad not in ('stop', 'skip'):
            raise UsageError(
                f"FiniteNumbersHook: on_bad={on_bad!r}; allowed are 'stop' "
                "and 'skip'"
            )
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise UsageError(
                f'FiniteNumbersHook: most={most!r}; allowed are integers '
                'from 1'
            )
        self.skips, self.most = on_bad == 'skip', most
        self.in_a_row = 0
        self._buffers: list[Tensor] = []
        self._skipped_this = False

    def before_train(self, runner: Any) -> None:
        """Stand before every step of the optimizer."""
        self._runner = runner
        self._model: nn.Module = bare_model(runner)
        self._names = {p: n for n, p in self._model.named_parameters()}
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, OptimWrapperDict):
            self._wrappers = list(wrapper.optim_wrappers.values())
        else:
            self._wrappers = [wrapper]
        for each in self._wrappers:
            each.optimizer.register_step_pre_hook(self._before_step)

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Look at the input."""
        self._batch, self._skipped_this = data_batch, False
        if self.skips:
            self._buffers = [b.clone() for b in self._model.buffers()]
        elif (sample := bad_sample(data_batch)) is not None:
            self._stop(f'the input, sample {sample} of the batch')

    def _before_step(
        self, optimizer: Optimizer, args: Any, kwargs: Any
    ) -> None:
        if getattr(optimizer, 'found_inf', None) is not None:
            return  # a fused one, which the loss scaler told what it found
        grads = {
            p: p.grad
            for group in optimizer.param_groups
            for p in group['params']
            if p.grad is not None
        }
        if not grads or _norm_is_finite(list(grads.values())):
            return
        bad = {
            self._names.get(p, 'a parameter outside of the model')
            for p, grad in grads.items()
            if not is_finite(grad)
        }
        if not bad:
            return  # their norm overflows, they do not
        place = first_bad_place(
            self._model,
            self._batch,
            bad,
            self._wrappers[0].optim_context(self._model),
        )
        if not self.skips:
            self._stop(place)
        for parameter in grads:
            parameter.grad = None  # the optimizer passes over those
        self._skip(place)

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        """Look at the losses; gradients need not have shown it.

        Their values come to the host in one go; the message hub would ask
        the GPU for each.
        """
        _fetch_scalars(outputs)
        if not self._skipped_this and not is_finite(outputs):
            bad = [k for k, v in (outputs or {}).items() if not is_finite(v)]
            place = bad[0]
            # the others do not know, and a repeated pass may wait for them
            if get_world_size() == 1:
                place = first_bad_place(
                    self._model,
                    data_batch,
                    context=self._wrappers[0].optim_context(self._model),
                )
            if not self.skips:
                self._stop(place)
            self._skip(place)
        if not self._skipped_this:
            self.in_a_row = 0

    def _skip(self, place: str) -> None:
        self._skipped_this = True
        self.in_a_row += 1
        if self.in_a_row > self.most:
            self._stop(f'{place}, and in the {self.most} steps before')
        hub = self._runner.message_hub
        count = hub.runtime_info.get(SKIPPED, 0) + 1
        hub.update_info(SKIPPED, count)
        with torch.no_grad():
            for buffer, value in zip(
                self._model.buffers(), self._buffers, strict=True
            ):
                buffer.copy_(value)
        print_log(
            f'step {self._runner.iter + 1} is skipped, {place} is not '
            f'finite; {count} skipped so far',
            logger='current',
            level=30,
        )

    def _stop(self, place: str) -> None:
        last = self._runner.message_hub.runtime_info.get('last_ckpt')
        raise TrainingError(
            f'step {self._runner.iter + 1}: NaN or infinity, first in '
            f'{place}; nothing was saved since '
            f'{last or "training began"} (a lower learning rate may help; '
            "mmauxq.FiniteNumbersHook with on_bad='skip' passes over such "
            'steps)'
        )


def _fetch_scalars(outputs: dict | None) -> None:
    """Put values on the host in the place of scalar tensors on a device."""
    found = [
        (name, value.detach().double().reshape(()))
        for name, value in (outputs or {}).items()
        if isinstance(value, Tensor) and value.is_cuda and value.numel() == 1
    ]
    if found and outputs is not None:
        names, values = zip(*found, strict=True)
        outputs.update(zip(names, torch.stack(values).cpu(), strict=True))


def _norm_is_finite(grads: list[Tensor]) -> bool:
    """One question to the device instead of one for each gradient."""
    return bool(torch.nn.utils.get_total_norm(grads).isfinite())
