"""The kernels of a step as two CUDA graphs, one each way."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmauxq.errors import UsageError

from .kernels.dispatch import keep_alive


class Recording:
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
        self.root = torch.zeros((), requires_grad=True)

    def replay(self, inputs: Tensor) -> Any:
        self._clone_pending_gradients()
        trained = self.trained if self._is_observed() else [self.root]
        outputs = iter(_Replay.apply(self, inputs, *trained))
        return tree_unflatten(
            [
                next(outputs) if isinstance(v, Tensor) else v
                for v in self.leaves
            ],
            self.structure,
        )

    def _is_observed(self) -> bool:
        """Whether somebody is to hear of each gradient: DDP, or a hook. If
        not, autograd need not visit each parameter, which takes the host as
        long as all else in a step."""
        return torch.distributed.is_initialized() or any(
            p._backward_hooks or p._post_accumulate_grad_hooks
            for p in self.trained
        )

    def keep_gradients(self) -> None:
        """Add those of the last backward pass to the parameters', as autograd
        would."""
        for parameter, grad in zip(self.trained, self.grads, strict=True):
            before = parameter.grad
            parameter.grad = grad if before is None else before + grad

    def _clone_pending_gradients(self) -> None:
        """Those that accumulate lie in memory that the next step takes."""
        for parameter, grad in zip(self.trained, self.grads, strict=True):
            waiting = parameter.grad
            if waiting is not None and waiting.data_ptr() == grad.data_ptr():
                parameter.grad = waiting.clone()


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


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recording: Recording, inputs: Tensor, *trained: Tensor
    ) -> tuple[Tensor, ...]:
        recording.inputs.copy_(inputs)
        recording.forward.replay()
        recording.replays += 1
        ctx.recording, ctx.number = recording, recording.replays
        ctx.observed = trained[0] is not recording.root
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
            return None, None, *(grad.detach() for grad in recording.grads)
        recording.keep_gradients()
        return None, None, None
