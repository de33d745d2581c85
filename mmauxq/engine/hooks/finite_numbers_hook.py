"""Training stops, or skips a step, where numbers are not finite."""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import Hook
from torch import Tensor, nn
from torch.optim import Optimizer

from mmauxq.errors import TrainingError, check_choice, check_integer
from mmauxq.forward_hooks import forward_hooks
from mmauxq.log import warn
from mmauxq.registry import HOOKS

from ..running import bare_model, tensors_in

SKIPPED = 'mmauxq/skipped_steps'


@dataclass
class _Step:
    """What is to be looked at of a step.

    Args:
        number: From 1.
        batch: As it came from the data loader.
        names: Of its losses, in the order of ``values``.
        values: The losses, then flags that are not 0 where a gradient is not
            finite; on their way to the host until ``arrived``.
    """

    number: int
    batch: Any
    names: list[str]
    values: Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> tuple[dict[str, float], bool]:
        """Losses by name, and whether all gradients are finite."""
        if self.arrived is not None:
            self.arrived.synchronize()
        numbers = self.values.tolist()
        losses = dict(zip(self.names, numbers, strict=False))
        return losses, not any(numbers[len(losses) :])


@HOOKS.register_module()
class FiniteNumbersHook(Hook):
    """Lets no step with NaN or infinity be made, and nothing of it be saved.

    Gradients are checked before the optimizer uses them, losses after each
    step; the message names the step and the first layer where it appeared.
    Steps that a loss scaler (float16) leaves out do not count.

    A fused optimizer leaves out a bad step, and all after it, by itself. The
    host then looks at a step while the GPU computes the next one, so that
    neither waits for the other.

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
    priority = 'HIGHEST'

    def __init__(self, on_bad: str = 'stop', most: int = 10) -> None:
        check_choice('FiniteNumbersHook: on_bad', on_bad, ('stop', 'skip'))
        check_integer('FiniteNumbersHook: most', most, 1)
        self.skips, self.most = on_bad == 'skip', most
        self.in_a_row = 0
        self._buffers: list[Tensor] = []
        self._skipped_this = False
        self._asked: dict[str, Tensor] = {}
        self._unread: deque[_Step] = deque()
        self._found: dict[torch.device, Tensor] = {}
        self._ones: dict[torch.device, Tensor] = {}

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
        self._asked = {}
        if self.skips:
            self._buffers = [b.clone() for b in self._model.buffers()]
            return
        images = _inputs(data_batch)
        if self._found and isinstance(images, Tensor) and images.is_cuda:
            if images.is_floating_point():
                self._asked['the input'] = 1 / images.isfinite().all()
        elif (sample := bad_sample(data_batch)) is not None:
            place = f'the input, sample {sample} of the batch'
            self._stop(runner.iter + 1, place)

    def _before_step(self, optimizer: Optimizer, *step: Any) -> None:
        every = [
            p for group in optimizer.param_groups for p in group['params']
        ]
        parameters = [p for p in every if p.grad is not None]
        if not parameters:
            return
        state = optimizer.state
        started = len(state) >= len(every) or all(
            p in state for p in parameters
        )
        scaler_found = getattr(optimizer, 'found_inf', None)
        if scaler_found is not None:
            # torch's SGD would keep a momentum that nothing was written to
            if not started and scaler_found.item():
                _pass_over(parameters)
            return
        grads = [p.grad for p in parameters]
        if started and _is_fused(optimizer):
            # its kernels skip the step, and the host need not wait for the GPU
            optimizer.grad_scale = None
            optimizer.found_inf = self._look_for_bad(grads)
        elif not _is_all_finite(grads):
            _pass_over(parameters)
            place = self._bad_gradient(self._batch)
            self._stop_or_skip(self._runner.iter + 1, place)

    def _look_for_bad(self, grads: list[Tensor]) -> Tensor:
        """A flag that is 1 from the first bad gradient on, else 0."""
        groups: dict[tuple, list[Tensor]] = {}
        for grad in grads:
            groups.setdefault((grad.device, grad.dtype), []).append(grad)
        device = grads[0].device
        if device not in self._found:
            self._found[device] = torch.zeros((), device=device)
            self._ones[device] = torch.ones((), device=device)
        found, one = self._found[device], self._ones[device]
        for values in groups.values():
            # one launch; it multiplies by 1
            torch._amp_foreach_non_finite_check_and_unscale_(
                values, found, one
            )
        return found

    def _after_step(self, optimizer: Optimizer, *step: Any) -> None:
        own = getattr(optimizer, 'found_inf', None)
        if any(own is found for found in self._found.values()):
            del optimizer.grad_scale, optimizer.found_inf

    def after_train_iter(
        self, runner: Any, *step: Any, outputs: Any = None, **more: Any
    ) -> None:
        """Check the losses, which can be bad where no gradient is."""
        outputs = outputs or {}
        later = {
            name: value.detach().reshape(())
            for name, value in outputs.items()
            if isinstance(value, Tensor)
            and value.numel() == 1
            and (value.is_cuda or self._found)
        }
        now = {k: v for k, v in outputs.items() if k not in later}
        self._check_losses(runner.iter + 1, self._batch, now)
        names, flags = [*later, *self._asked], self._found.values()
        if names or flags:
            # a copy: the next step of a recording takes the memory of losses
            values = torch.stack(
                [*later.values(), *self._asked.values(), *flags]
            )
            outputs.update(zip(later, values, strict=False))
            self._unread.append(
                _Step(runner.iter + 1, self._batch, names, *_sent(values))
            )
        self._check_steps(1 if self._found and not self.skips else 0)
        if not self._skipped_this:
            self.in_a_row = 0

    def after_train_epoch(self, runner: Any, **more: Any) -> None:
        """Look at all steps, before anything else is done."""
        self._check_steps()

    before_save_checkpoint = before_val = after_train_epoch

    def _check_steps(self, left: int = 0) -> None:
        """Look at all steps but the last ``left``."""
        while len(self._unread) > left:
            step = self._unread.popleft()
            losses, is_good = step.read()
            if not is_good and not self._skipped_this:
                for found in self._found.values():
                    found.zero_()
                place = self._bad_gradient(step.batch)
                self._stop_or_skip(step.number, place)
            self._check_losses(step.number, step.batch, losses)

    def _check_losses(self, number: int, batch: Any, losses: dict) -> None:
        bad = [name for name, value in losses.items() if not is_finite(value)]
        if not bad or self._skipped_this:
            return
        place = bad[0]
        if get_world_size() == 1:  # other ranks would not repeat the pass
            places = filter(None, self._bad_places(batch))
            place = next(places, place)
        self._stop_or_skip(number, place)

    def _bad_gradient(self, batch: Any) -> str:
        """Where it came from: all ranks have it, but one may know."""
        for place in self._bad_places(batch):
            for known in all_gather_object(place):
                if known is not None:
                    return known
        return 'a gradient'

    def _bad_places(self, batch: Any) -> Iterator[str | None]:
        with self._runner.optim_wrapper.optim_context(self._model):
            yield from bad_places(self._model, batch)

    def _stop_or_skip(self, number: int, place: str) -> None:
        if not self.skips:
            self._stop(number, place)
        self._skipped_this = True
        self.in_a_row += 1
        if self.in_a_row > self.most:
            self._stop(number, f'{place}, and in the {self.most} steps before')
        hub = self._runner.message_hub
        count = hub.runtime_info.get(SKIPPED, 0) + 1
        hub.update_info(SKIPPED, count)
        buffers = zip(self._model.buffers(), self._buffers, strict=True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        warn(
            f'step {number} is skipped, {place} is not finite; {count} '
            'skipped so far'
        )

    def _stop(self, number: int, place: str) -> None:
        last = self._runner.message_hub.runtime_info.get('last_ckpt')
        raise TrainingError(
            f'step {number}: NaN or infinity, first in {place}; nothing was '
            'saved since '
            f'{last or "training began"} (a lower learning rate may help; '
            "mmauxq.FiniteNumbersHook with on_bad='skip' passes over such "
            'steps)'
        )


def _sent(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and what tells that it is there."""
    if not values.is_cuda:
        return values, None
    copy, arrived = values.to('cpu', non_blocking=True), torch.cuda.Event()
    arrived.record()
    return copy, arrived


def _is_all_finite(values: list[Tensor]) -> bool:
    """Whether no number of ``values`` is NaN or infinity."""
    if all(x.device.type == 'cpu' and not x.is_sparse for x in values):
        # the sum of all is finite only if each is; small tensors cost less
        # in this way than one by one
        if math.isfinite(torch.cat([x.flatten() for x in values]).sum()):
            return True
    # the largest magnitude cannot overflow, as the sum of squares can
    largest = nn.utils.get_total_norm(values, torch.inf)
    return math.isfinite(largest)


def _is_fused(optimizer: Optimizer) -> bool:
    """Whether its kernels leave out a step where ``found_inf`` is set."""
    return getattr(optimizer, '_step_supports_amp_scaling', False) and all(
        group.get('fused') for group in optimizer.param_groups
    )


def _pass_over(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None  # the optimizer passes over those


def is_finite(value: Any) -> bool:
    """Whether no tensor in ``value``, and no number, is NaN or infinity."""
    if isinstance(value, float):
        return math.isfinite(value)
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


def _inputs(batch: Any) -> Any:
    return batch.get('inputs') if isinstance(batch, dict) else None


def bad_sample(batch: Any) -> int | None:
    """Index of the first input of a batch that is not finite."""
    inputs = _inputs(batch)
    if inputs is None or is_finite(inputs):
        return None
    return next(i for i, sample in enumerate(inputs) if not is_finite(sample))


def bad_places(model: nn.Module, batch: Any) -> Iterator[str | None]:
    """Look for the first place where a training step is not finite.

    The step is repeated, kernel by kernel. Buffers change as in any step,
    gradients are lost.

    Args:
        model: An MMEngine model, with a mode ``loss``.
        batch: As it came from the data loader.

    Yields:
        Three answers, each ``None`` if nothing is found, or if memory runs
        short: a parameter or the input; the output of the first layer in the
        order of running, or a loss; the first gradient that the backward pass
        computes. All ranks can ask for them together.
    """
    yield _bad_start(model, batch)
    order: list[str] = []
    bad: list[str] = []
    losses: dict[str, Tensor] = {}

    def note(name: str, module: Any, x: Any, output: Any) -> None:
        order.append(name)
        if not is_finite(output):
            bad.append(f'the output of {name}')

    layers = [
        (name, module)
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    model.zero_grad()
    with suppress(torch.OutOfMemoryError):
        with getattr(model, 'eager', nullcontext)():
            with forward_hooks(layers, note):
                data = model.data_preprocessor(batch, True)
                losses = model(**data, mode='loss')
        bad += (name for name, loss in losses.items() if not is_finite(loss))
    yield bad[0] if bad else None
    with suppress(torch.OutOfMemoryError):
        if losses:
            model.parse_losses(losses)[0].backward()
    found = {
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not is_finite(p.grad)
    }
    model.zero_grad()
    for module in reversed(order):
        for name in sorted(found):
            if name.rpartition('.')[0] == module:
                yield f'the gradient of {name}'
                return
    yield f'the gradient of {min(found)}' if found else None


def _bad_start(model: nn.Module, batch: Any) -> str | None:
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            return f'parameter {name}'
    sample = bad_sample(batch)
    known = sample is not None
    return f'the input, sample {sample} of the batch' if known else None
