"""A training step that is compiled where that works."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmauxq.errors import one_line
from mmauxq.log import log
from mmauxq.restoring import snapshot

from .watched import hooked, hooks_of


class CompiledStep:
    """Calls a compiled step for sizes of images that come again.

    Other sizes, such as that of the last batch of an epoch, are not worth a
    compilation. Hooks that came after it would not be called, so that the
    other form runs while there are any. If the compiler fails, the other form
    runs from then on, with one line in the log.

    Args:
        compiled: From images, (N, C, H, W), to any nesting of tensors.
        other: The same in another form.
        model: Whose buffers a failed attempt may have changed.
    """

    def __init__(
        self,
        compiled: Callable[[Tensor], Any],
        other: Callable[[Tensor], Any],
        model: nn.Module,
    ) -> None:
        self.compiled, self.other, self.model = compiled, other, model
        self.sizes: set[torch.Size] = set()
        self.failed = False
        self._last: torch.Size | None = None
        self._hooks: list[tuple[str, dict]] | None = None

    def __call__(self, inputs: Tensor) -> Any:
        """The step of ``inputs``."""
        if self._hooks is None:
            self._hooks = hooks_of(self.model)
        if hooked(self._hooks) is not None:
            return self.other(inputs)
        size, before = inputs.shape, self._last
        self._last = size
        if size in self.sizes:
            return self.compiled(inputs)
        if self.failed or size != before or not torch.is_grad_enabled():
            return self.other(inputs)
        restore = snapshot(self.model)
        try:
            result = self.compiled(inputs)
        except Exception as error:
            self.failed = True
            log(
                'JointQAT: the step is not compiled, which may be slower: '
                f'{one_line(error)}'
            )
        else:
            self.sizes.add(size)
            return result
        restore()
        return self.other(inputs)


def use_plain_numbers(model: nn.Module) -> None:
    """Make Python's numbers of those of NumPy that modules keep, such as
    mmcv's ``DropPath``. The compiler cannot decide by one of NumPy, and would
    cut the step in parts there, five for each block of a transformer."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, np.generic):
                module.__dict__[name] = value.item()


@contextmanager
def no_cache_of_casts() -> Iterator[None]:
    """While active, autocast keeps no cast of a weight. A recording must not
    use one, and what was compiled with the cache would be compiled anew
    without it."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
