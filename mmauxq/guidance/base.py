"""What every form of guidance has in common."""

import math
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmauxq.errors import UsageError

from .taps import Tap


def is_weight(value: object) -> bool:
    """Whether ``value`` is a finite number from 0."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 <= value < math.inf
    )


class Guidance(BaseModule):
    """Takes what was tapped from F and returns losses; F does not know it.

    Built by the algorithm after the shapes are known, so that DDP and the
    optimizer see every parameter.

    Args:
        taps: What is read from F, in the order in which it is computed; the
            stem first if ``uses_stem``.
        head: The head of F. Its loss module serves the guidance's own
            classifiers too, so that label smoothing and mixed targets are the
            same for both.
        num_classes: K, the width of the logits of F.
        loss_weight: Factor on all losses returned, not negative. A schedule
            may change it while training (``GuidanceWeightHook``).

    Attributes:
        loss_weight: Shape (), float32. Not stored in checkpoints: it is the
            config's and the schedule's.
    """

    uses_stem = False

    def __init__(
        self,
        taps: Sequence[Tap],
        head: nn.Module,
        num_classes: int,
        loss_weight: float = 1.0,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not is_weight(loss_weight):
            raise UsageError(
                f'guidance.loss_weight={loss_weight!r}; allowed '
                'are numbers from 0'
            )
        self.register_buffer(
            'loss_weight', torch.tensor(float(loss_weight)), persistent=False
        )

    def forward(self, outputs: dict[str, Tensor]) -> Tensor:
        """Logits of the guidance's classifier, (N, K)."""
        raise NotImplementedError

    def loss(self, outputs: dict[str, Tensor], data_samples: list) -> dict:
        """Losses, already weighted.

        Args:
            outputs: Name of a tap -> its tensor, (N, *shape of the tap).
            data_samples: The samples of the batch, as the head of F gets.

        Returns:
            Name with ``loss`` in it -> tensor of shape (); other names are
            only logged.
        """
        raise NotImplementedError
