"""A training step that is recorded once as CUDA graphs, then replayed."""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmauxq.errors import UsageError

from .kernels.dispatch import keep_alive


class GraphedStep:
    """Calls a step; one that comes again is recorded, and then replayed.

    A quantized network has about a thousand kernels in a step, and the host
    needs longer to launch some of them than the GPU to run them. Replayed, a
    step is one launch forward and one backward. The kernels are those of the
    eager step; so are losses, gradients, buffers and random numbers.

    A step is eager the first time its kind is met, and recorded if that comes
    twice in a row. The kind is all that a recording holds fixed: shape of the
    images, autocast, and of every module its mode, its parameters and buffers
    (address, whether trained), its children, and the numbers that it computes
    with, such as a dropout rate, a momentum, the bits of a quantizer or the
    weights of distillation terms. A hook may schedule any of them: the step is
    then recorded anew. What differs from the recording only once, as the last
    batch of an epoch may, runs eagerly, and so does everything without
    gradients or on a CPU.

    ``torch.cuda.make_graphed_callables`` is not used because it forbids other
    threads to use the GPU meanwhile, as a loader that pins memory does; runs
    the step to warm up, which moves running statistics; and gives gradients
    in memory that the next step overwrites, which loses those that wait
    (``accumulative_counts``).

    Args:
        step: From images, (N, C, H, W), to any nesting of tensors.
        model: Whose parameters are trained by it.

    Raises:
        UsageError: When a step is recorded that asks the GPU for a value,
            draws random numbers on the host, which would be the same in every
            step, or checkpoints activations.
    """

    def __init__(self, step: Callable[[Tensor], Any], model: nn.Module):
        self.step, self.model = step, model
        self._recording: _Recording | None = None
        self._last: tuple | None = None
        self._watched: _Watched | None = None

    def __call__(self, inputs: Tensor) -> Any:
        """``step(inputs)``. The result is valid until the next call."""
        if not (inputs.is_cuda and torch.is_grad_enabled()):
            return self.step(inputs)
        kind = self._kind(inputs)
        if self._recording is None or kind != self._recording.kind:
            if kind != self._last:
                self._last = kind
                return self.step(inputs)
            self._recording = None  # frees its memory for the next one
            self._recording = self._record(inputs, kind)
        self._last = kind
        return self._recording.replay(inputs)

    def _kind(self, inputs: Tensor) -> tuple:
        if self._watched is None or self._watched.is_outdated():
            self._watched = _Watched(self.model)
        return (
            inputs.shape,
            inputs.stride(),
            inputs.dtype,
            inputs.device,
            torch.is_autocast_enabled('cuda')
            and torch.get_autocast_dtype('cuda'),
            self._watched.state(),
        )

    def _record(self, inputs: Tensor, kind: tuple) -> '_Recording':
        start, before = time.perf_counter(), _random_state()
        generator = torch.cuda.default_generators[inputs.device.index]
        gpu_state = generator.get_state()
        try:
            recording = _Recording(self.step, self.model, inputs, kind)
        except RuntimeError as error:
            # after a failed capture, the generator stays in capture mode
            fresh = torch.Generator(inputs.device)
            fresh.set_state(gpu_state)
            generator.graphsafe_set_state(fresh)
            raise UsageError(
                f'cuda_graph: this step cannot be recorded ({_cause(error)}); '
                'set model.speed.cuda_graph=False'
            ) from error
        if _random_state() != before:
            raise UsageError(
                'cuda_graph: this step draws random numbers on the host, '
                'which would be the same in every step; set '
                'model.speed.cuda_graph=False'
            )
        print_log(
            f'JointQAT: a step of shape {tuple(inputs.shape)} is recorded as '
            f'CUDA graphs, in {time.perf_counter() - start:.1f} s',
            logger='current',
        )
        return recording


def _cause(error: BaseException) -> str:
    """Why a capture failed, in one line."""
    # the end of a failed capture fails as well
    while error.__context__ is not None:
        error = error.__context__
    if 'torch.utils.checkpoint' in str(error):
        return 'it checkpoints activations; with_cp=False avoids that'
    return str(error).splitlines()[0]


class _Watched:
    """What a recording holds fixed of a model, and a hook may change.

    The lists are collected once, because this is asked in every step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.tables = [
            table
            for module in self.modules
            for table in (module._parameters, module._buffers)
            if table
        ]
        self.children = [m._modules for m in self.modules if m._modules]
        self.known = self._children()
        self.numbers = [
            (module.__dict__, name)
            for module in self.modules
            for name, value in module.__dict__.items()
            if _is_number(value, name)
        ]

    def _children(self) -> list:
        return [id(c) for table in self.children for c in table.values()]

    def is_outdated(self) -> bool:
        """Whether a module was added, removed or replaced."""
        return self._children() != self.known

    def state(self) -> tuple:
        """Equal for two steps if a recording of one is right for the other."""
        return (
            self.known,
            [module.training for module in self.modules],
            [
                t is not None and (t.data_ptr(), t.requires_grad)
                for table in self.tables
                for t in table.values()
            ],
            [
                tuple(value) if isinstance(value, list) else value
                for table, name in self.numbers
                for value in (table.get(name),)
            ],
        )


def _is_number(value: object, name: str) -> bool:
    """Floats and lists of floats, and the bits of a quantizer."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(v, float) for v in value)
    return isinstance(value, float) or name == 'bits'


def _random_state() -> tuple:
    """State of the generators of the host."""
    name, keys, *rest = np.random.get_state()  # type: ignore[misc]
    return (
        random.getstate(),
        (name, keys.tobytes(), *rest),
        torch.get_rng_state().numpy().tobytes(),
    )


class _Recording:
    """The kernels of a forward and a backward pass, and their memory."""

    def __init__(
        self,
        step: Callable[[Tensor], Any],
        model: nn.Module,
        inputs: Tensor,
        kind: tuple,
    ) -> None:
        self.kind, self.replays = kind, 0
        self.inputs = inputs.detach().clone()
        self.forward = torch.cuda.CUDAGraph()
        self.backward = torch.cuda.CUDAGraph()
        settings: dict[str, Any] = dict(
            pool=torch.cuda.graph_pool_handle(),
            stream=torch.cuda.Stream(inputs.device),
            # other threads may go on: loaders that pin memory, NCCL's watch
            capture_error_mode='thread_local',
        )
        # a cached cast of a weight would be that of this step forever
        autocast = torch.autocast(
            'cuda',
            enabled=torch.is_autocast_enabled('cuda'),
            dtype=torch.get_autocast_dtype('cuda'),
            cache_enabled=False,
        )
        # a backward pass is run outside of autocast, which would reach it
        no_autocast = torch.autocast('cuda', enabled=False)
        with (
            _aliases(model) as aliases,
            torch.cuda.device(inputs.device),
            keep_alive() as self.kept,
        ):
            with autocast, torch.cuda.graph(self.forward, **settings):
                found = step(self.inputs)
            leaves, self.structure = tree_flatten(found)
            outputs = [v for v in leaves if isinstance(v, Tensor)]
            roots = [v for v in outputs if v.requires_grad]
            _check_leaves(roots, aliases.values())
            self.given = [torch.empty_like(v) for v in roots]
            with no_autocast, torch.cuda.graph(self.backward, **settings):
                grads = torch.autograd.grad(
                    roots,
                    list(aliases.values()),
                    self.given,
                    allow_unused=True,
                )
        self.leaves = [
            v.detach() if isinstance(v, Tensor) else v for v in leaves
        ]
        self.differentiable = [v.requires_grad for v in outputs]
        pairs = [
            (p, g)
            for p, g in zip(aliases, grads, strict=True)
            if g is not None
        ]
        self.trained = [parameter for parameter, _ in pairs]
        self.grads = [grad for _, grad in pairs]

    def replay(self, inputs: Tensor) -> Any:
        self._clone_pending_gradients()
        outputs = iter(_Replay.apply(self, inputs, *self.trained))
        return tree_unflatten(
            [
                next(outputs) if isinstance(v, Tensor) else v
                for v in self.leaves
            ],
            self.structure,
        )

    def _clone_pending_gradients(self) -> None:
        """Those that accumulate lie in memory that the next step takes."""
        for parameter, grad in zip(self.trained, self.grads, strict=True):
            waiting = parameter.grad
            if waiting is not None and waiting.data_ptr() == grad.data_ptr():
                parameter.grad = waiting.clone()


@contextmanager
def _aliases(model: nn.Module) -> Iterator[dict[nn.Parameter, Tensor]]:
    """While entered, modules have aliases in the place of their parameters.

    They lie in the same memory but are new to autograd. An earlier step or DDP
    may hold the node that accumulates the gradients of a parameter; it belongs
    to another stream, which a recording cannot wait for.

    Yields:
        Parameter -> its alias, of those that are trained.
    """
    before, found = [], {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                if parameter not in found:
                    found[parameter] = nn.Parameter(parameter.detach())
                before.append((module, name, parameter))
                module._parameters[name] = found[parameter]
    try:
        yield found
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def _check_leaves(roots: Iterable[Tensor], known: Iterable[Tensor]) -> None:
    """See that the step trains nothing that it took from elsewhere."""
    ids = {id(tensor) for tensor in known}
    todo = [root.grad_fn for root in roots]
    seen = set(todo)
    while todo:
        node = todo.pop()
        leaf = getattr(node, 'variable', None)
        if leaf is not None and id(leaf) not in ids:
            raise UsageError(
                'cuda_graph: a module keeps a parameter of shape '
                f'{tuple(leaf.shape)} outside of its place, where a recording '
                'would not find it; set model.speed.cuda_graph=False'
            )
        for source, _ in node.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                todo.append(source)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recording: _Recording, inputs: Tensor, *trained: Tensor
    ) -> tuple[Tensor, ...]:
        recording.inputs.copy_(inputs)
        recording.forward.replay()
        recording.replays += 1
        ctx.recording, ctx.number = recording, recording.replays
        outputs = [
            v.detach() for v in recording.leaves if isinstance(v, Tensor)
        ]
        pairs = zip(outputs, recording.differentiable, strict=True)
        ctx.mark_non_differentiable(*(v for v, needed in pairs if not needed))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recording = ctx.recording
        if ctx.number != recording.replays:
            raise RuntimeError(
                'cuda_graph: another step ran before the backward pass of '
                'this one, whose memory it has taken; set '
                'model.speed.cuda_graph=False'
            )
        pairs = zip(grads, recording.differentiable, strict=True)
        needed = [grad for grad, needed in pairs if needed]
        for place, grad in zip(recording.given, needed, strict=True):
            place.copy_(grad)
        recording.backward.replay()
        return None, None, *(grad.detach() for grad in recording.grads)
