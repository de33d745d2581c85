"""A training step in the form that ``model.speed`` asks for."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmengine.dist import get_world_size
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from mmauxq.errors import UsageError, one_line
from mmauxq.log import log, warn
from mmauxq.restoring import snapshot

from .compiled import CompiledStep, no_cache_of_casts, use_plain_numbers
from .cuda_graph import GraphedStep, log_eager
from .faster_operations import FasterOperations
from .fused_norm import FusedBatchNorms, materialize
from .grouped_weights import GroupedWeights
from .kernels.dispatch import is_forced
from .kernels.norm import has_kernels
from .recompute import Recompute, compiling_for
from .speed import Speed

WEIGHT_GROUPS = 4
"""In how many parts ranks exchange the gradients of quantized weights."""


def accelerate(model: Any, speed: Any = None) -> 'AcceleratedStep':
    """The training step of ``model``, made fast.

    Args:
        model: A :class:`mmauxq.algorithms.JointQAT`.
        speed: Value of ``model.speed``: ``None``, ``'auto'`` or a dict, see
            :class:`.speed.Speed`.

    Raises:
        UsageError: If an option is unknown, or the loss of the model is not
            computed from the logits alone and shall be compiled or recorded.
    """
    return AcceleratedStep(model, Speed.from_config(speed))


class AcceleratedStep:
    """Runs ``model.compute``: eager, compiled, or recorded as CUDA graphs.

    Args:
        model: Has ``compute``, from images (N, C, H, W) to the logits of F
            and the outputs of the guidances; and ``recording``, a context in
            which the taps are recorded.
        speed: The options.
    """

    def __init__(self, model: Any, speed: Speed) -> None:
        self.model, self.speed = model, speed
        self.channels_last = speed.channels_last
        if self.channels_last is None:
            self.channels_last = torch.cuda.is_available()
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        self._reset()

    def _reset(self) -> None:
        self.weights = GroupedWeights()
        self.fused_norms: FusedBatchNorms | None = FusedBatchNorms(
            products=self.speed.memory is None
        )
        self.recorded: GraphedStep | None = None
        self.compiled: Callable | None = None
        self._is_first = True
        if self.speed.compile:
            self._compile(self.speed.compile)
        if self.speed.cuda_graph:
            self._record()
        if self.speed.auto and torch.cuda.is_available():
            self._choose()

    def __getstate__(self) -> dict:
        # recordings and compiled code belong to this process and this model
        return dict(
            model=self.model,
            speed=self.speed,
            channels_last=self.channels_last,
        )

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._stale = True

    def __call__(
        self, compute: Callable[[Tensor], Any], inputs: Tensor
    ) -> Any:
        """``compute(inputs)`` with the taps recorded, in its fastest form.

        Args:
            compute: ``model.compute``, or another function of the images,
                which is run eagerly.
            inputs: (N, C, H, W).
        """
        if self.__dict__.pop('_stale', False):  # a copy of another step
            self._reset()
        inputs = self._laid_out(inputs)
        if compute != self.model.compute:
            with self._entered():
                return compute(inputs)
        is_first, self._is_first = self._is_first, False
        if self.recorded is not None:
            return self.recorded(inputs)
        if self.compiled is not None and not is_first:
            return self._run_compiled(inputs)
        return self._plain(inputs)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """While active, no step is compiled or recorded, so that hooks on the
        modules of F are called."""
        forms = self.compiled, self.recorded
        self.compiled = self.recorded = None
        try:
            yield
        finally:
            self.compiled, self.recorded = forms

    @contextmanager
    def contiguous(self) -> Iterator[None]:
        """While active, the parameters of the model are contiguous: random
        numbers fill memory in its order, so that another layout would start
        from other weights."""
        if self.channels_last:
            self.model.to(memory_format=torch.contiguous_format)
        yield
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)

    def _laid_out(self, inputs: Tensor) -> Tensor:
        if self.channels_last and inputs.dim() == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    def evaluate(self, run: Callable[[], Any]) -> Any:
        """``run()``, which uses the model beside a step, and trains nothing;
        a recording that leaves it too little memory is dropped."""
        return run() if self.recorded is None else self.recorded.beside(run)

    def _plain(self, inputs: Tensor) -> tuple[Any, list]:
        """Kernel by kernel."""
        if is_forced():
            return self._fused(inputs)
        with self._entered():
            return self.model.compute(inputs)

    def _fused(self, inputs: Tensor) -> tuple[Any, list]:
        """Kernel by kernel, with fused batch norms and other faster forms:
        more work for the host, less for the GPU."""
        modes: list[Any] = []
        if has_kernels(inputs) and torch.is_grad_enabled():
            if self.speed.memory is None:
                modes.append(FasterOperations())
            if self._plan_fusions(inputs):
                modes.append(self.fused_norms)
        with self._entered(), ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return self.model.compute(inputs)

    @contextmanager
    def _entered(self, compiled: bool = False) -> Iterator[None]:
        """What surrounds a step: taps, weights and memory."""
        groups = WEIGHT_GROUPS if get_world_size() > 1 else 1
        with (
            self.model.recording(),
            self.weights.active(self.model.architecture, groups),
            ExitStack() as stack,
        ):
            if compiled:
                stack.enter_context(compiling_for(self.speed.memory))
            elif self.speed.memory is not None:
                stack.enter_context(Recompute(self.speed.memory))
            yield

    def _compile(self, options: Mapping | bool) -> None:
        self._check_plain('compile', None)
        options = {} if options is True else dict(options)  # type: ignore[arg-type]
        options.pop('_scope_', None)
        use_plain_numbers(self.model)
        try:
            self.compiled = torch.compile(self.model.compute, **options)
        except (TypeError, RuntimeError) as error:
            raise UsageError(
                f'model.speed.compile: expected arguments of torch.compile, '
                f'got {options}: {error}'
            ) from error
        log(
            'JointQAT: the step is compiled when it runs for the second time, '
            'which may take minutes'
        )

    def _choose(self) -> None:
        """Record the step, compiled if it has no batch norms: the compiler
        fuses layer norms and activations with quantizers, which kernels do
        not."""
        if self.model.has_own_loss:
            log_eager(f'the loss of a {self._names()} needs more than logits')
            return
        if any(isinstance(m, _BatchNorm) for m in self.model.modules()):
            self._record()
            return
        self._compile(dict(dynamic=False))
        step = CompiledStep(self._run_compiled, self._plain, self.model)
        # the first step is eager, and the second one is compiled
        self.recorded = GraphedStep(step, self.model, optional=True, after=2)

    def _run_compiled(self, inputs: Tensor) -> Any:
        with self._entered(compiled=True), no_cache_of_casts():
            return self.compiled(inputs)  # type: ignore[misc]

    def _record(self) -> None:
        self._check_plain('cuda_graph', False)
        if not torch.cuda.is_available():
            warn(
                'JointQAT: there is no GPU, so that model.speed.cuda_graph '
                'has no effect'
            )
        self.recorded = GraphedStep(
            self._fused, self.model, self._plain, self.speed.auto
        )

    def _check_plain(self, option: str, without: object) -> None:
        if self.model.has_own_loss:
            raise UsageError(
                f'model.speed.{option}: expected a head whose loss is '
                f'computed from logits alone, got a {self._names()}; set it '
                f'to {without}'
            )

    def _names(self) -> str:
        architecture = self.model.architecture
        head = type(architecture.head).__name__
        return f'{head} in a {type(architecture).__name__}'

    def _plan_fusions(self, inputs: Tensor) -> bool:
        """Whether there are batch norms to fuse. This is found out once, in
        passes of two images that leave no trace."""
        if self.fused_norms is None:
            return False
        if self.fused_norms.fusions is not None:
            return bool(self.fused_norms.fusions)
        restore = snapshot(self.model)
        try:
            self._find_fusions(inputs[:2])
            if self.speed.auto and self.fused_norms.fusions:
                with self._entered(), self.fused_norms:
                    self.model.compute(inputs[:2])
        except Exception as error:
            if not self.speed.auto:
                raise
            self.fused_norms = None
            log(
                'JointQAT: batch norms run by themselves, which is slower: '
                f'{one_line(error)}'
            )
        restore()
        if self.fused_norms is not None and self.fused_norms.fusions is None:
            self.fused_norms = None  # there is no batch norm
        return self.fused_norms is not None

    def _find_fusions(self, few: Tensor) -> None:
        model = self.model
        for recorder in model.all_recorders():
            recorder.materialize = materialize
        with self._entered(), self.fused_norms:
            logits = model.student(few)
            tapped = [t for r in model.recorders for t in r.outputs().values()]
            outputs = model.guide(few)
            for guidance in model.guidances:
                for recorder in guidance.recorders:
                    tapped += recorder.outputs().values()
            self.fused_norms.plan(tree_leaves((logits, outputs)), tapped)
            model.release()
