"""Batches of a loader, the next one on its way while the GPU computes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

END = object()


class Batches:
    """The batches of a loader, one after the other, then :data:`END`.

    In every step the host waits for the GPU, for the values of the losses.
    What :meth:`fetch` does before that, :meth:`take` need not do after it.

    Args:
        batches: From the loader.
        device: To which the images of a batch are moved; ``None`` leaves them.
    """

    def __init__(
        self, batches: Iterator[Any], device: torch.device | None = None
    ) -> None:
        self.batches, self.device = batches, device
        self._next: Any = None
        self._stream = None
        if device is not None and device.type == 'cuda':
            self._stream = torch.cuda.Stream(device)

    def fetch(self) -> None:
        """Have the next batch ready, unless it is."""
        if self._next is None:
            self._next = self._moved(next(self.batches, END))

    def take(self) -> Any:
        """The next batch, or ``END``."""
        self.fetch()
        batch, self._next = self._next, None
        if self._stream is not None and isinstance(batch, dict):
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self._stream)
            for tensor in _tensors(batch.get('inputs')):
                tensor.record_stream(now)
        return batch

    def _moved(self, batch: Any) -> Any:
        if self.device is None or not isinstance(batch, dict):
            return batch
        with torch.cuda.stream(self._stream):
            return dict(batch, inputs=self._to_device(batch.get('inputs')))

    def _to_device(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.device, non_blocking=True)
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._to_device, value))
        return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


def device_of(model: nn.Module) -> torch.device | None:
    """Where a model is, if that is a GPU."""
    parameter = next(model.parameters(), None)
    if parameter is None or not parameter.is_cuda:
        return None
    return parameter.device
