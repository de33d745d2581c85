"""The forms in which a training step is run."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mmauxq.errors import UsageError
from mmauxq.layers import Chains, LessMemory, WeightsAtOnce, compiling_for
from mmauxq.ops.dispatch import is_forced
from mmauxq.ops.norm import has_kernels
from mmauxq.quantizers import calibrating

from .graphed_step import GraphedStep

if TYPE_CHECKING:
    from .joint_qat import JointQAT

WEIGHT_GROUPS = 4
"""In how many parts ranks exchange the gradients of quantized weights."""


class StepForms:
    """Calls ``model.compute`` in the form that the config asks for.

    All forms are the same step: launched one by one, compiled, or recorded as
    CUDA graphs; all weights quantized at once; batch norms in chains; less
    kept for the backward pass.

    Args:
        model: Of which this is a part.
        compile: As of :class:`.joint_qat.JointQAT`, like the next two.
        cuda_graph: As there.
        memory: As there.

    Raises:
        UsageError: If something else is asked for, or the loss of the model
            is not that of the logits alone.
    """

    def __init__(
        self,
        model: 'JointQAT',
        compile: dict | bool | None = None,
        cuda_graph: bool = False,
        memory: str | None = None,
    ) -> None:
        self.model, self.memory = model, memory
        if memory is not None:
            LessMemory(memory)  # says what is allowed
        self.weights_at_once: WeightsAtOnce | None = None
        self.chains = Chains()
        self.compiled: Callable | None = None
        self.recorded: GraphedStep | None = None
        self._is_first = True
        if compile:
            self._compile({} if compile is True else dict(compile))
        if cuda_graph:
            self._record(cuda_graph, bool(compile))

    def __call__(
        self, inputs: Tensor, calibrates: bool
    ) -> tuple[Tensor, list]:
        """A step.

        Args:
            inputs: (N, C, H, W).
            calibrates: Whether quantizers take their scales from this batch.

        Returns:
            As of ``model.compute``.
        """
        is_first, self._is_first = self._is_first, False
        if calibrates:
            with self.entered(calibrates=True):
                return self.model.compute(inputs)
        if self.compiled is not None and not is_first:
            with self.entered(compiled=True):
                return self.compiled(inputs)
        return (self.recorded or self.one_by_one)(inputs)

    def one_by_one(self, inputs: Tensor) -> tuple[Tensor, list]:
        """With batch norms in chains, if this form of the step has them."""
        wanted = self.recorded is not None or is_forced()
        with ExitStack() as stack:
            if wanted and has_kernels(inputs) and torch.is_grad_enabled():
                self._find_chains(inputs)
                stack.enter_context(self.entered())
                stack.enter_context(self.chains)
            else:
                stack.enter_context(self.entered())
            return self.model.compute(inputs)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """While entered, no step is compiled or recorded."""
        forms = self.compiled, self.recorded
        self.compiled = self.recorded = None
        try:
            yield
        finally:
            self.compiled, self.recorded = forms

    @contextmanager
    def entered(
        self, calibrates: bool = False, compiled: bool = False
    ) -> Iterator[None]:
        """What surrounds a step: taps, and how quantizers and memory work."""
        with ExitStack() as stack:
            for owner in (self.model, *self.model.guidances):
                for recorder in owner.recorders:
                    stack.enter_context(recorder)
            if calibrates:
                stack.enter_context(calibrating(self.model.architecture))
            else:
                if self.weights_at_once is None:
                    self.weights_at_once = WeightsAtOnce(
                        self.model.architecture,
                        WEIGHT_GROUPS if get_world_size() > 1 else 1,
                    )
                stack.enter_context(self.weights_at_once.active())
            if compiled:
                stack.enter_context(compiling_for(self.memory))
            elif self.memory is not None:
                stack.enter_context(LessMemory(self.memory))
            yield

    def _compile(self, options: dict) -> None:
        self._check_plain('compile', None)
        options.pop('_scope_', None)
        try:
            self.compiled = torch.compile(self.model.compute, **options)
        except (TypeError, RuntimeError) as error:
            raise UsageError(f'compile={options}: {error}') from error

    def _record(self, wanted: bool, compiled: bool) -> None:
        if wanted is not True:
            raise UsageError(
                f'cuda_graph={wanted!r}; allowed are True and False'
            )
        if compiled:
            raise UsageError(
                'cuda_graph and compile exclude each other; '
                "compile=dict(mode='reduce-overhead') compiles and records"
            )
        self._check_plain('cuda_graph', False)
        if not torch.cuda.is_available():
            print_log(
                'JointQAT: there is no GPU, so cuda_graph has no effect',
                logger='current',
                level=logging.WARNING,
            )
        self.recorded = GraphedStep(self.one_by_one, self.model)

    def _check_plain(self, option: str, without: object) -> None:
        architecture = self.model.architecture
        if not self.model.is_plain:
            raise UsageError(
                f'{option}: a {type(architecture.head).__name__} or '
                f'{type(architecture).__name__} has a loss of its own, '
                f'which is left out of it; set model.{option}={without}'
            )

    def _find_chains(self, inputs: Tensor) -> None:
        """Once, in a pass of two images that leaves no trace."""
        if self.chains.links is not None:
            return
        model, few = self.model, inputs[:2]
        devices = [inputs.device] if inputs.is_cuda else []
        buffers = [(b, b.clone()) for b in model.buffers()]
        with torch.random.fork_rng(devices), self.entered(), self.chains:
            logits = model.student(few)
            tapped = _tapped(model)
            found = model.guide(few)
            for guidance in model.guidances:
                tapped += _tapped(guidance)
            self.chains.plan(tree_leaves((logits, found)), tapped)
            model.release()
        for buffer, value in buffers:
            buffer.copy_(value)


def _tapped(owner: Any) -> list[Tensor]:
    return [t for r in owner.recorders for t in r.outputs().values()]
