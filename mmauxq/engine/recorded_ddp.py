"""The wrapper of a model that trains on several ranks."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from torch import Tensor

from mmauxq.registry import MODEL_WRAPPERS


@MODEL_WRAPPERS.register_module()
class RecordedDDP(MMDistributedDataParallel):
    """MMEngine's DDP; ranks exchange the gradients of a recorded step at once.

    DDP hears of each gradient as autograd reaches its parameter, and sends
    them in buckets while others are computed. The gradients of a step that is
    replayed as a CUDA graph are all there at the same time. To visit each
    parameter then takes the host longer than all else in a step, and hides
    nothing. So they lie one behind the other, and one collective operation
    gives their mean, with the arithmetic of DDP: each rank divides, then they
    are added up. Steps that are not recorded are those of DDP, and so is all
    with a communication hook. Without a recorded step in the model, this is
    ``MMDistributedDataParallel``.

    Args:
        args: For ``MMDistributedDataParallel``.
        kwargs: For it, too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recorded: Any = None
        self._has_hook = False

    def register_comm_hook(self, state: Any, hook: Any) -> None:
        """Of DDP; gradients then go the way of DDP in each step."""
        self._has_hook = True
        super().register_comm_hook(state, hook)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """That of the model."""
        step = getattr(self.module, 'step', None)
        recorded = getattr(step, 'recorded', None)
        if recorded is None or self._has_hook:
            return super().forward(*inputs, **kwargs)
        waits = not self.require_backward_grad_sync
        recorded.average = _leave if waits else self._average
        recorded.averaged = False
        self._recorded = recorded
        try:
            return super().forward(*inputs, **kwargs)
        finally:
            self._recorded = recorded.average = None

    def _post_forward(self, output: Any) -> Any:
        """Let DDP wait for no gradients where it will hear of none."""
        if self._recorded is None or not self._recorded.averaged:
            return super()._post_forward(output)
        with self.no_sync():
            return super()._post_forward(output)

    def _average(self, flats: Sequence[Tensor]) -> None:
        for flat in flats:
            flat /= self.process_group.size()
            dist.all_reduce(flat, group=self.process_group)


def _leave(flats: Sequence[Tensor]) -> None:
    """While gradients are accumulated, ranks keep theirs."""
