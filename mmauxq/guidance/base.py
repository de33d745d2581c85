"""What every form of guidance has in common.

The low-precision network F is read at P *taps*, the outputs O_1..O_P of its
blocks. Guidance computes losses from them; here with the auxiliary module H::

      images
        |
      stem ------------------------> phi_0 ---> g_0
        |                                        |
      block 1 --- tap O_1 ---------> phi_1 ---> (+) ReLU ---> g_1
        |                                        |
       ...                                      ...
        |                                        |
      block P --- tap O_P ---------> phi_P ---> (+) ReLU ---> g_P
        |                                        |
      pool, classifier                   pool, classifier
        |                                        |
      L_F  (student.*)                   L_H  (guidance.*)

      F: low precision, shipped          H: full precision, training only
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule, Sequential
from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.network import forked_generators

from .taps import CHANNELS_LAST, MAP, Tap, TapRecorder

TaskLoss = Callable[[Tensor], Tensor]
"""From logits (N, K) to the loss () that F has for the targets of a batch."""


class Guidance(BaseModule):
    """Losses computed from the tapped outputs of F, in training only.

    A step has two parts: :meth:`forward`, from tensors to tensors, which may
    be compiled or recorded, and :meth:`losses`, which knows the targets.

    The algorithm also gives a subclass ``taps``, what is read from F, in the
    order of running, the images first if ``uses_image``, the stem first if
    ``uses_stem``; ``num_classes``, K; and if ``uses_image`` the ``network`` F
    in floating point with its ``data_preprocessor``.

    Args:
        loss_weight: Factor on all losses returned, not negative. A schedule
            may change it while training (``GuidanceWeightHook``).
        dtype: ``None`` lets autocast decide, as for F; ``'float32'`` computes
            the guidance in float32 also under automatic mixed precision.

    Attributes:
        loss_weight: Shape (), float32. Not stored in checkpoints: it belongs
            to the config and the schedule.
        recorders: Of other modules, such as a teacher; entered with F's.
        gives_aux_logits: Whether :meth:`forward` returns the logits of an
            auxiliary module, which other guidances may use.
        needs_aux_logits: Whether :meth:`losses` needs them.
    """

    uses_stem = False
    uses_image = False
    gives_aux_logits = False
    needs_aux_logits = False

    def __init__(
        self,
        loss_weight: float,
        dtype: str | None,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not is_weight(loss_weight):
            raise UsageError(
                'guidance.loss_weight: expected a number from 0, got '
                f'{loss_weight!r}'
            )
        if dtype not in ('float32', None):
            raise UsageError(
                f"guidance.dtype: expected 'float32' or None, got {dtype!r}"
            )
        self.dtype = dtype
        self.recorders: list[TapRecorder] = []
        self.register_buffer(
            'loss_weight', torch.tensor(float(loss_weight)), persistent=False
        )

    @classmethod
    def default_taps(cls, config: dict) -> str | None:
        """The value of ``taps`` for a config without it."""
        return 'auto'

    def init_weights(self) -> None:
        """Initialise; F starts from the same weights whatever guides it."""
        with forked_generators(self):
            super().init_weights()

    def attach(self, network: nn.Module, recorder: TapRecorder) -> TapRecorder:
        """Called once, with F in floating point and a recorder of its taps;
        returns the one that gives :meth:`forward` its tensors."""
        return recorder

    def prepare(self, network: nn.Module) -> None:
        """Called before the first step, with F quantized and loaded."""

    def forward(self, outputs: dict[str, Tensor]) -> Any:
        """What :meth:`losses` takes; logits (N, K) if ``gives_aux_logits``.

        Args:
            outputs: Name of a tap -> its tensor, (N, *shape of the tap).
        """
        raise NotImplementedError

    def losses(
        self,
        output: Any,
        logits: Tensor | None,
        aux_logits: Tensor | None,
        task_loss: TaskLoss,
    ) -> dict[str, Tensor]:
        """Name -> weighted loss of shape (); logged only without ``loss`` in
        the name.

        Args:
            output: Result of :meth:`forward`.
            logits: Logits of F, (N, K); ``None`` if its head hides them.
            aux_logits: Logits of the auxiliary module, (N, K), if any.
            task_loss: The loss of F, with its label smoothing and the targets
                of the batch, mixed ones too.
        """
        raise NotImplementedError

    def precision(self) -> AbstractContextManager:
        """The context that the guidance computes in: autocast or not."""
        if self.dtype is None:
            return nullcontext()
        return full_precision(self.loss_weight.device)

    def cast(self, x: Tensor) -> Tensor:
        """``x`` in the precision of the guidance."""
        return x if self.dtype is None else x.float()


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context without autocast."""
    return torch.autocast(device.type, enabled=False)


def student_logits(logits: Tensor | None) -> Tensor:
    """Logits of F, (N, K), in float32; a UsageError if its head hides them."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UsageError(
            'guidance: expected a head of F that gives logits (N, K) in '
            'training, got one that gives none to compare with'
        )
    return logits.float()


# --- arguments ---------------------------------------------------------------


def is_weight(value: object) -> bool:
    """Whether ``value`` is a finite number from 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


def check_weights(
    weights: float | Sequence[float], taps: Sequence[Tap], where: str
) -> list[float]:
    """One weight for each tap, from one for all or a list, else a UsageError
    about the config key ``where``."""
    if isinstance(weights, (int, float)):
        weights = [weights] * len(taps)
    several = isinstance(weights, (list, tuple))
    if not several or not all(map(is_weight, weights)):
        raise UsageError(
            f'{where}: expected a number from 0 or a list of them, got '
            f'{weights!r}'
        )
    if len(weights) != len(taps):
        raise UsageError(
            f'{where}: expected {len(taps)} weights, one for each tap '
            f'({", ".join(tap.name for tap in taps)}), got {len(weights)}'
        )
    return list(weights)


# --- classifiers -------------------------------------------------------------


def pool(features: Tensor, layout: str) -> Tensor:
    """The mean over all positions, (N, C), in any layout of a tap."""
    if layout == MAP:
        return F.adaptive_avg_pool2d(features, 1).flatten(1)
    return features.mean((1, 2) if layout == CHANNELS_LAST else 1)


def linear_classifier(in_channels: int, num_classes: int) -> nn.Module:
    """From pooled features (N, C) to logits (N, K), initialised as the linear
    head of MMPretrain."""
    layer = OrderedDict(fc=nn.Linear(in_channels, num_classes))
    init = dict(type='Normal', layer='Linear', std=0.01)
    return Sequential(layer, init_cfg=init)
