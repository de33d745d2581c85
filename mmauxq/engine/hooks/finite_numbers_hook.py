"""Training stops, or skips a step, where numbers are not finite."""

import math
from collections.abc import Set
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.optim import Optimizer

from mmauxq.errors import TrainingError, check_integer, unknown_name
from mmauxq.forward_hooks import forward_hooks
from mmauxq.registry import HOOKS

from ..running import bare_model, tensors_in

SKIPPED = 'mmauxq/skipped_steps'
Gradients = dict[nn.Parameter, Tensor]


@HOOKS.register_module()
class FiniteNumbersHook(Hook):
    """Lets no step with NaN or infinity be made, and nothing of it be saved.

    Gradients are checked before the optimizer uses them, losses after each
    step; the message names the step and the first layer where it appeared.
    Steps that a loss scaler (float16) leaves out do not count.

    Args:
        on_bad: ``'stop'`` ends the run with exit status 1. ``'skip'`` leaves
            the step out - parameters, optimizer and batch-norm statistics
            stay - and counts it (``mmauxq/skipped_steps`` in the message
            hub).
        most: How many steps in a row may be skipped before the run ends.

    Raises:
        UsageError: If an argument is out of its range.
    """

    # before anything is saved, logged or averaged; and before the message hub
    # fetches each loss from the GPU
    priority = 'HIGHEST'

    def __init__(self, on_bad: str = 'stop', most: int = 10) -> None:
        if on_bad not in ('stop', 'skip'):
            raise unknown_name(
                'FiniteNumbersHook: on_bad', on_bad, ('stop', 'skip')
            )
        check_integer('FiniteNumbersHook: most', most, 1)
        self.skips, self.most = on_bad == 'skip', most
        self.in_a_row = 0
        self._buffers: list[Tensor] = []
        self._skipped_this = False
        self._unread: list[tuple[Tensor, Gradients]] = []

    def before_train(self, runner: Any) -> None:
        self._runner = runner
        self._model: nn.Module = bare_model(runner)
        optimizer = runner.optim_wrapper.optimizer
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        self._batch, self._skipped_this = data_batch, False
        if self.skips:
            self._buffers = [b.clone() for b in self._model.buffers()]
        elif (sample := bad_sample(data_batch)) is not None:
            self._stop(f'the input, sample {sample} of the batch')

    def _before_step(self, optimizer: Optimizer, *step: Any) -> None:
        grads = {
            p: p.grad
            for group in optimizer.param_groups
            for p in group['params']
            if p.grad is not None
        }
        if not grads:
            return
        scaler_found = getattr(optimizer, 'found_inf', None)
        if scaler_found is not None:
            # torch's SGD would keep a momentum that nothing was written to
            if not _has_started(optimizer, grads) and scaler_found.item():
                _pass_over(grads)
            return
        fused = _is_fused(optimizer) and _has_started(optimizer, grads)
        if not fused and _has_finite_sum(list(grads.values())):
            return
        # the largest magnitude cannot overflow, as the sum of squares can
        largest = nn.utils.get_total_norm(list(grads.values()), torch.inf)
        bad = (~largest.isfinite()).float()
        if fused:
            # its kernels skip the step, and the host need not wait for the GPU
            optimizer.grad_scale, optimizer.found_inf = None, bad
            self._unread.append((bad, grads))
        elif bad.item():
            self._leave_out(grads)

    def _after_step(self, optimizer: Optimizer, *step: Any) -> None:
        own = getattr(optimizer, 'found_inf', None)
        if self._unread and own is self._unread[-1][0]:
            del optimizer.grad_scale, optimizer.found_inf

    def _leave_out(self, grads: Gradients) -> None:
        names = {p: n for n, p in self._model.named_parameters()}
        bad = {
            names.get(p, 'a parameter outside of the model')
            for p, grad in grads.items()
            if not is_finite(grad)
        }
        _pass_over(grads)
        self._stop_or_skip(self._first_bad_place(bad))

    def _first_bad_place(self, bad_gradients: Set[str] = frozenset()) -> str:
        with self._runner.optim_wrapper.optim_context(self._model):
            return first_bad_place(self._model, self._batch, bad_gradients)

    def after_train_iter(
        self, runner: Any, *step: Any, outputs: Any = None, **more: Any
    ) -> None:
        """Check the losses, which can be bad where no gradient is."""
        outputs = outputs or {}
        unread, self._unread = self._unread, []
        flags = _fetch(outputs, [bad for bad, _ in unread])
        for (_, grads), bad in zip(unread, flags, strict=True):
            if bad and not self._skipped_this:
                self._leave_out(grads)
        bad_losses = [k for k, v in outputs.items() if not is_finite(v)]
        if bad_losses and not self._skipped_this:
            place = bad_losses[0]
            if get_world_size() == 1:  # other ranks would not repeat the pass
                place = self._first_bad_place()
            self._stop_or_skip(place)
        if not self._skipped_this:
            self.in_a_row = 0

    def _stop_or_skip(self, place: str) -> None:
        if not self.skips:
            self._stop(place)
        self._skipped_this = True
        self.in_a_row += 1
        if self.in_a_row > self.most:
            self._stop(f'{place}, and in the {self.most} steps before')
        hub = self._runner.message_hub
        count = hub.runtime_info.get(SKIPPED, 0) + 1
        hub.update_info(SKIPPED, count)
        buffers = zip(self._model.buffers(), self._buffers, strict=True)
        with torch.no_grad():
            for buffer, value in buffers:
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


def _has_started(optimizer: Optimizer, grads: Gradients) -> bool:
    return all(parameter in optimizer.state for parameter in grads)


def _has_finite_sum(values: list[Tensor]) -> bool:
    """Whether the sum of all numbers, on the CPU, is finite: then each of
    them is. Small tensors cost less in this way than one by one."""
    if any(x.device.type != 'cpu' or x.is_sparse for x in values):
        return False
    return math.isfinite(torch.cat([x.flatten() for x in values]).sum())


def _is_fused(optimizer: Optimizer) -> bool:
    """Whether its kernels leave out a step where ``found_inf`` is set."""
    return getattr(optimizer, '_step_supports_amp_scaling', False) and all(
        group.get('fused') for group in optimizer.param_groups
    )


def _pass_over(grads: Gradients) -> None:
    for parameter in grads:
        parameter.grad = None  # the optimizer passes over those


def _fetch(outputs: dict, more: list[Tensor]) -> list[float]:
    """Bring scalars of ``outputs``, and ``more``, to the host in one go.

    Returns:
        The values of ``more``; those of ``outputs`` take their places.
    """
    losses = {
        name: value
        for name, value in outputs.items()
        if isinstance(value, Tensor) and value.is_cuda and value.numel() == 1
    }
    wanted = [*losses.values(), *more]
    if not wanted:
        return []
    values = torch.stack(
        [value.detach().double().reshape(()) for value in wanted]
    ).cpu()
    outputs.update(zip(losses, values, strict=False))
    return values[len(losses) :].tolist()


def is_finite(value: Any) -> bool:
    """Whether no tensor in ``value`` holds NaN or infinity."""
    answers: dict[torch.device, list[Tensor]] = {}
    for x in tensors_in(value):
        if not x.is_floating_point():
            continue
        if x.numel() == 1 and not x.is_cuda:
            if not math.isfinite(x.item()):  # launches nothing
                return False
        else:
            answers.setdefault(x.device, []).append(x.isfinite().all())
    # one transfer for each device, because the host waits for it
    return all(bool(torch.stack(each).all()) for each in answers.values())


def bad_sample(batch: Any) -> int | None:
    """Index of the first input of a batch that is not finite."""
    inputs = batch.get('inputs') if isinstance(batch, dict) else None
    if inputs is None or is_finite(inputs):
        return None
    return next(i for i, sample in enumerate(inputs) if not is_finite(sample))


@torch.no_grad()
def first_bad_place(
    model: nn.Module, batch: Any, bad_gradients: Set[str] = frozenset()
) -> str:
    """Name the first place where a training step is not finite.

    The step is repeated without gradients: parameters, input, the output of
    each layer in the order of running, losses. If all of them are finite,
    it is a gradient: the first one that the backward pass computes. Buffers
    change as in any step.

    Args:
        model: A model with ``data_preprocessor`` and mode ``loss``.
        batch: As it came from the data loader.
        bad_gradients: Names of parameters whose gradient is not finite.
    """
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            return f'parameter {name}'
    sample = bad_sample(batch)
    if sample is not None:
        return f'the input, sample {sample} of the batch'
    order: list[str] = []
    bad: list[str] = []

    def note(name: str, module: Any, x: Any, output: Any) -> None:
        order.append(name)
        if not bad and not is_finite(output):
            bad.append(name)

    layers = [
        (name, module)
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    with forward_hooks(layers, note):
        losses = model(**model.data_preprocessor(batch, True), mode='loss')
    if bad:
        return f'the output of {bad[0]}'
    for name, value in losses.items():
        if not is_finite(value):
            return name
    for module in reversed(order):
        for name in sorted(bad_gradients):
            if name.rpartition('.')[0] == module:
                return f'the gradient of {name}'
    return f'the gradient of {min(bad_gradients, default="an unknown layer")}'
