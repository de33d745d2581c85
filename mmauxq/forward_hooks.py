"""Hooks on many modules at once."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def forward_hooks(
    modules: Iterable[tuple[str, nn.Module]],
    hook: Callable[[str, nn.Module, Any, Any], Tensor | None],
) -> Iterator[None]:
    """Call ``hook`` after each forward pass of (name, module) pairs.

    It takes the name, the module, its first positional argument (``None`` if
    there is none) and its output; a tensor that it returns replaces that.
    """
    with ExitStack() as handles:
        for name, module in modules:
            handle = module.register_forward_hook(
                lambda module, args, output, name=name: hook(
                    name, module, args[0] if args else None, output
                )
            )
            handles.enter_context(handle)
        yield
