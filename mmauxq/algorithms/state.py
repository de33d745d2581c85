"""The state of JointQAT: where it comes from, and what a state dict holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from mmengine.dist import get_world_size
from torch import Tensor, nn

from mmauxq.checkpoint_file import read_source
from mmauxq.guidance.teacher import Teacher
from mmauxq.network import restoring, seed_generators
from mmauxq.network.checkpoint import check_architecture, normalise
from mmauxq.quantizers import (
    calibrate,
    keep_positive,
    learned_scales,
    uncalibrated,
)


def keep_all(
    model: Any, state: dict[str, Tensor], prefix: str, metadata: Any
) -> None:
    """State-dict hook: put back what a module of the architecture left out.

    MMPretrain's LoRA keeps only the low-rank weights, because the others are
    in the float checkpoint; the scales of the quantizers are not.
    """
    for path, module in model.named_modules():
        inner = f'{prefix}{path}.' if path else prefix
        for name, tensor in (module._parameters | module._buffers).items():
            temporary = name in module._non_persistent_buffers_set
            if tensor is not None and not temporary:
                state.setdefault(inner + name, tensor.detach())


def keep_scales_positive(model: Any, prefix: str, keep_vars: bool) -> None:
    """State-dict hook, before: in a loop without MMEngine there is no
    QuantizerWatchHook that does it after each step."""
    keep_positive(learned_scales(model))


@contextmanager
def initialising(model: Any) -> Iterator[None]:
    """While active, the weights of ``model`` may be initialised, except those
    of frozen teachers, which are hidden."""
    before = [(g._modules, dict(g._modules)) for g in model.guidances]
    for modules, all_modules in before:
        for name, module in all_modules.items():
            if isinstance(module, Teacher) and not module.trained:
                del modules[name]
    try:
        with nullcontext() if model.step is None else model.step.contiguous():
            yield
    finally:
        for modules, all_modules in before:
            modules.clear()
            modules.update(all_modules)


def adapt_state(model: Any, state: dict[str, Tensor], prefix: str) -> None:
    """Make a training, slim or float checkpoint one of ``model``.

    Args:
        model: What it is loaded into.
        state: Changed in place: keys of F get the prefix ``architecture.``,
            those of a guidance that ``model`` does not have go, and without
            any the guidance stays as it is.
        prefix: Of the keys of ``model``.

    Raises:
        UsageError: If it belongs to another architecture.
    """
    inner = f'{prefix}architecture.'
    if not any(key.startswith(inner) for key in state):
        for key in [k for k in state if k.startswith(prefix)]:
            state[inner + key.removeprefix(prefix)] = state.pop(key)
    stored = [key for key in state if key.startswith(f'{prefix}guidance.')]
    if model.guidance is None:
        for key in stored:
            del state[key]
    elif not stored:
        own = model.guidance.state_dict(prefix=f'{prefix}guidance.')
        state.update(own)
    architecture = {
        key.removeprefix(inner): value
        for key, value in state.items()
        if key.startswith(inner)
    }
    check_architecture(model.architecture, architecture, 'checkpoint')


def load_float(architecture: nn.Module, source: str) -> None:
    """Fill F from a float checkpoint, a file or an URL, whose head may have
    other classes; a UsageError if it is of another architecture."""
    state = normalise(read_source(source), source)
    state = check_architecture(architecture, state, source, other_head=True)
    architecture.load_state_dict(state, strict=False)


def set_scales(architecture: nn.Module, run: Callable[[], Any]) -> None:
    """Calibrate the quantizers that have no scale, in passes ``run()`` of F
    that leave no trace: in training mode, and then in evaluation mode for
    layers that only sometimes run."""
    for evaluate in (False, True):
        if not uncalibrated(architecture):
            return
        with restoring(architecture), torch.no_grad():
            if get_world_size() > 1:  # the same layers on all ranks
                seed_generators(architecture)
            if evaluate:
                architecture.eval()
            calibrate(architecture, run)
