"""The kernels of a step as two CUDA graphs, one each way."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmauxq.errors import UsageError

from .kernels.dispatch import keep_alive

Average = Callable[[Sequence[Tensor]], None]
"""Gives flat gradients, in place, their mean over all ranks."""
_recordings: 'WeakSet[Recording]' = WeakSet()


class Recording:
    """The kernels of a forward and a backward pass, and their memory.

    Args:
        step: From images, (N, C, H, W), to any nesting of tensors.
        model: Whose parameters are trained by it.
        inputs: The images that it is recorded with.
        kind: All that it holds fixed.
        flat: Whether the gradients of one dtype lie one behind the other, so
            that ranks can exchange them in one go.
    """

    def __init__(
        self,
        step: Callable[[Tensor], Any],
        model: nn.Module,
        inputs: Tensor,
        kind: tuple,
        flat: bool = False,
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
            aliases_of(model) as aliases,
            torch.cuda.device(inputs.device),
            keep_alive() as self.kept,
        ):
            with autocast, torch.cuda.graph(self.forward, **settings):
                found = step(self.inputs)
            leaves, self.structure = tree_flatten(found)
            outputs = [v for v in leaves if isinstance(v, Tensor)]
            roots = [v for v in outputs if v.requires_grad]
            check_leaves(roots, aliases.values())
            self.given = [torch.empty_like(v) for v in roots]
            with no_autocast, torch.cuda.graph(self.backward, **settings):
                grads = torch.autograd.grad(
                    roots,
                    list(aliases.values()),
                    self.given,
                    allow_unused=True,
                )
                pairs = [
                    (p, g)
                    for p, g in zip(aliases, grads, strict=True)
                    if g is not None
                ]
                self.grads = [grad for _, grad in pairs]
                self.flats: list[Tensor] = []
                if flat:
                    self.flats, self.grads = flattened(self.grads)
        self.leaves = [
            v.detach() if isinstance(v, Tensor) else v for v in leaves
        ]
        self.differentiable = [v.requires_grad for v in outputs]
        self.trained = [parameter for parameter, _ in pairs]
        self.root = torch.zeros((), requires_grad=True)
        _recordings.add(self)

    def replay(self, inputs: Tensor, average: Average | None = None) -> Any:
        """The step with other images.

        Args:
            inputs: As in the recording.
            average: Called in the backward pass, with the gradients that
                this pass and those before have added up; only where
                :meth:`averages` says so.
        """
        self._clone_pending_gradients()
        trained = [self.root]
        if average is None and self._is_observed():
            trained = self.trained
        outputs = iter(_Replay.apply(self, inputs, average, *trained))
        return tree_unflatten(
            [
                next(outputs) if isinstance(v, Tensor) else v
                for v in self.leaves
            ],
            self.structure,
        )

    def averages(self, average: Average | None) -> bool:
        """Whether a replay leaves the exchange between ranks to ``average``,
        not to what DDP has attached to each parameter."""
        return average is not None and bool(self.flats) and not self._hooks()

    def _is_observed(self) -> bool:
        """Whether somebody is to hear of each gradient: DDP, or a hook. If
        not, autograd need not visit each parameter, which takes the host as
        long as all else in a step."""
        return torch.distributed.is_initialized() or self._hooks()

    def _hooks(self) -> bool:
        return any(
            p._backward_hooks or p._post_accumulate_grad_hooks
            for p in self.trained
        )

    def keep_gradients(self, average: Average | None) -> None:
        """Add those of the parameters to those of the last backward pass, as
        autograd would, and give them to the parameters."""
        for parameter, grad in zip(self.trained, self.grads, strict=True):
            if parameter.grad is not None:
                grad += parameter.grad
            parameter.grad = grad
        if average is not None:
            average(self.flats)

    def _clone_pending_gradients(self) -> None:
        """Those that accumulate lie in memory that the next step takes."""
        for parameter, grad in zip(self.trained, self.grads, strict=True):
            waiting = parameter.grad
            if waiting is not None and waiting.data_ptr() == grad.data_ptr():
                parameter.grad = waiting.clone()


def release_recordings() -> None:
    """Free the CUDA graphs of all recordings, which cannot be replayed then.

    To be called before ``torch.distributed.destroy_process_group``: NCCL waits
    for ever for graphs that hold one of its operations, such as SyncBN's.
    """
    for recording in list(_recordings):
        recording.forward.reset()
        recording.backward.reset()


@contextmanager
def aliases_of(model: nn.Module) -> Iterator[dict[nn.Parameter, Tensor]]:
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


def check_leaves(roots: Iterable[Tensor], known: Iterable[Tensor]) -> None:
    """See that the step trains nothing that it took from elsewhere."""
    ids = {id(tensor) for tensor in known}
    todo = [root.grad_fn for root in roots]
    seen = set(todo)
    while todo:
        node = todo.pop()
        leaf = getattr(node, 'variable', None)
        if leaf is not None and id(leaf) not in ids:
            raise UsageError(
                f'a module keeps a parameter of shape {tuple(leaf.shape)} '
                'outside of its place, where a recording would not find it'
            )
        for source, _ in node.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                todo.append(source)


def flattened(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Copies that lie one behind the other.

    Returns:
        A flat tensor for each dtype, and for each of ``tensors`` its part of
        one, with the same strides where those leave no gap.
    """
    flats: list[Tensor] = []
    parts: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        chosen = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        sizes = [tensors[i].numel() for i in chosen]
        flats.append(tensors[chosen[0]].new_empty(sum(sizes)))
        for i, part in zip(chosen, flats[-1].split(sizes), strict=True):
            shape, stride = tensors[i].shape, tensors[i].stride()
            last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
            parts[i] = part.view(shape)
            if last == part.numel() - 1:
                offset = part.storage_offset()
                parts[i] = part.as_strided(shape, stride, offset)
    views = [parts[i] for i in range(len(tensors))]
    if views:
        torch._foreach_copy_(views, list(tensors))
    return flats, views


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recording: Recording,
        inputs: Tensor,
        average: Average | None,
        *trained: Tensor,
    ) -> tuple[Tensor, ...]:
        recording.inputs.copy_(inputs)
        recording.forward.replay()
        recording.replays += 1
        ctx.recording, ctx.number = recording, recording.replays
        ctx.observed = trained[0] is not recording.root
        ctx.average = average
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
                'another step ran before the backward pass of this one, whose '
                'memory it has taken; set model.speed={} (or --eager)'
            )
        pairs = zip(grads, recording.differentiable, strict=True)
        needed = [grad for grad, needed in pairs if needed]
        for place, grad in zip(recording.given, needed, strict=True):
            place.copy_(grad)
        recording.backward.replay()
        if ctx.observed:
            given = (grad.detach() for grad in recording.grads)
            return None, None, None, *given
        recording.keep_gradients(ctx.average)
        return None, None, None, None
