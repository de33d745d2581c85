"""A training step that is recorded once as CUDA graphs, then replayed."""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmauxq.errors import UsageError, one_line
from mmauxq.log import log
from mmauxq.restoring import host_state, snapshot

from .recording import Average, Recording
from .watched import Watched, hooked

NEVER = sys.maxsize
WORTH_RECORDING = 100
"""Replays after which a recording has saved more time than it took."""


class GraphedStep:
    """Calls a step; one that comes again is recorded, and then replayed.

    A quantized network has about a thousand kernels in a step, and the host
    needs longer to launch some of them than the GPU to run them. Replayed, a
    step is one launch forward and one backward. The kernels are those of the
    eager step; so are losses, gradients, buffers and random numbers.

    A step runs as it is the first time its kind is met, and is recorded if
    that comes twice in a row. The kind is all that a recording holds fixed:
    shape of the images, autocast, and of every module its mode, its parameters
    and buffers (address, whether trained), its children, and the numbers that
    it computes with, such as a dropout rate, a momentum, the bits of a
    quantizer or the weights of distillation terms. A hook may schedule any of
    them: the step is then recorded anew, after a longer wait each time if
    recordings are hardly replayed. What differs from the recording only once,
    as the last batch of an epoch may, runs eagerly. So does everything without
    gradients or on a CPU, and a model with hooks, which a recording would not
    call.

    ``torch.cuda.make_graphed_callables`` is not used because it forbids other
    threads to use the GPU meanwhile, as a loader that pins memory does; runs
    the step to warm up, which moves running statistics; and gives gradients
    in memory that the next step overwrites, which loses those that wait
    (``accumulative_counts``).

    Args:
        step: From images, (N, C, H, W), to any nesting of tensors.
        model: Whose parameters are trained by it.
        plain: The form of the step that runs where nothing is recorded for
            good, and where hooks are called; by default ``step``.
        optional: Whether a step that cannot be recorded stays eager, with one
            line in the log, instead of ending the run.
        after: How many steps of a kind are not recorded, at least 1; those in
            which ``step`` is compiled have to be among them.

    Raises:
        UsageError: When a step is recorded that asks the GPU for a value,
            draws random numbers or counts on the host, which would be the
            same in every step, or checkpoints activations.
    """

    def __init__(
        self,
        step: Callable[[Tensor], Any],
        model: nn.Module,
        plain: Callable[[Tensor], Any] | None = None,
        optional: bool = False,
        after: int = 1,
    ) -> None:
        self.step, self.plain = step, plain or step
        self.model, self.optional, self.after = model, optional, after
        self.recording: Recording | None = None
        self.average: Average | None = None
        """What exchanges gradients between ranks. Only a step that was
        recorded while there was one calls it; :attr:`averaged` says so."""
        self.averaged = False
        """Whether the backward pass of the last call will call it."""
        self._watched: Watched | None = None
        self._last: tuple | None = None
        self._repeats, self._patience = 0, after
        self._logged: set[str] = set()

    def __call__(self, inputs: Tensor) -> Any:
        """``step(inputs)``. The result is valid until the next call."""
        self.averaged = False
        records = self._patience != NEVER
        if not (records and inputs.is_cuda and torch.is_grad_enabled()):
            return self.plain(inputs)
        if self._watched is None or self._watched.is_outdated():
            self._watched = Watched(self.model)
        name = hooked(self._watched.hooks)
        if name is not None:
            self._log(f'{name} has a hook, which a recording would not call')
            return self.beside(partial(self.plain, inputs))
        kind = _kind(inputs, self._watched)
        self._repeats = self._repeats + 1 if kind == self._last else 0
        self._last = kind
        if self.recording is not None and kind == self.recording.kind:
            return self._replay(self.recording, inputs)
        if self._repeats < self._patience:
            return self.beside(partial(self.step, inputs))
        self._forget()
        try:
            self.recording = self._record(inputs, kind, self._watched)
        except UsageError as error:
            if not self.optional:
                raise
            self._log(str(error))
            self._patience = NEVER
        if self.recording is None:  # the error is gone, and what it held
            torch.cuda.empty_cache()
            return self.plain(inputs)
        return self._replay(self.recording, inputs)

    def _replay(self, recording: Recording, inputs: Tensor) -> Any:
        self.averaged = recording.averages(self.average)
        return recording.replay(
            inputs, self.average if self.averaged else None
        )

    def beside(self, run: Callable[[], Any]) -> Any:
        """``run()``, beside a recording that keeps the memory of its step.

        If memory runs short, the recording is dropped and ``run`` called
        again.

        Args:
            run: Uses the model, and changes its buffers at most.
        """
        if self.recording is None:
            return run()
        # in evaluation mode, nothing changes that could be set back
        restore = snapshot(self.model) if self.model.training else None
        try:
            return run()
        except torch.OutOfMemoryError:
            pass  # the error holds the tensors of the failed call
        self._forget()
        torch.cuda.empty_cache()
        if restore is not None:
            restore()
        return run()

    def _forget(self) -> None:
        if self.recording is not None:
            worth = self.recording.replays >= WORTH_RECORDING
            self._patience = self.after if worth else 2 * self._patience
        self.recording = None  # frees its memory for the next one

    def _log(self, reason: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            log_eager(reason)

    def _record(
        self, inputs: Tensor, kind: tuple, watched: Watched
    ) -> Recording:
        start, restore = time.perf_counter(), snapshot(self.model)
        state, counts = host_state(), watched.counts()
        generator = torch.cuda.default_generators[inputs.device.index]
        gpu_state = generator.get_state()
        try:
            flat = self.average is not None
            recording = Recording(self.step, self.model, inputs, kind, flat)
            if host_state() != state:
                raise UsageError(
                    'it draws random numbers on the host, which would be the '
                    'same in every step'
                )
            if watched.counts() != counts:
                raise UsageError('a module counts its calls on the host')
        except Exception as error:
            # after a failed capture, the generator stays in capture mode
            fresh = torch.Generator(inputs.device)
            fresh.set_state(gpu_state)
            generator.graphsafe_set_state(fresh)
            restore()
            raise UsageError(
                f'cuda_graph: this step cannot be recorded ({_reason(error)});'
                ' set model.speed.cuda_graph=False'
            ) from error
        log(
            f'JointQAT: a step of shape {tuple(inputs.shape)} is recorded as '
            f'CUDA graphs, in {time.perf_counter() - start:.1f} s'
        )
        return recording


def log_eager(reason: str) -> None:
    """Log why steps are not recorded."""
    log(
        'JointQAT: steps are launched kernel by kernel, which is slower: '
        f'{reason}'
    )


def _kind(inputs: Tensor, watched: Watched) -> tuple:
    return (
        inputs.shape,
        inputs.stride(),
        inputs.dtype,
        inputs.device,
        torch.is_autocast_enabled('cuda') and torch.get_autocast_dtype('cuda'),
        watched.state(),
    )


def _reason(error: BaseException) -> str:
    """Why a capture failed, in one line."""
    while error.__context__ is not None:  # the end of a capture fails, too
        error = error.__context__
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory is full; model.speed.memory='codes' needs less"
        )
    if 'torch.utils.checkpoint' in str(error):
        return 'it checkpoints activations; with_cp=False avoids that'
    return one_line(error)
