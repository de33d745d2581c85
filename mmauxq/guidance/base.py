"""What every form of guidance has in common."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmauxq.errors import UsageError

from .taps import Tap, TapRecorder

LOGITS = 'logits'
"""Key of the logits of F among the signals of :meth:`Guidance.losses`."""

AUX_LOGITS = 'aux_logits'
"""Key of the logits of the auxiliary module, if there is one."""


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
    optimizer see every parameter. A step has two parts: :meth:`forward`,
    from tensors to tensors, which may be compiled, and :meth:`losses`, which
    knows the targets.

    Args:
        taps: What is read from F, in the order in which it is computed; the
            images first if ``uses_image``, the stem first if ``uses_stem``.
        head: The head of F. Its loss module serves the guidance's own
            classifiers too, so that label smoothing and mixed targets are the
            same for both.
        num_classes: K, the width of the logits of F.
        loss_weight: Factor on all losses returned, not negative. A schedule
            may change it while training (``GuidanceWeightHook``).
        dtype: ``'float32'`` computes the guidance in full precision also
            under automatic mixed precision; ``None`` lets autocast decide.

    Attributes:
        loss_weight: Shape (), float32. Not stored in checkpoints: it is the
            config's and the schedule's.
        frozen: Modules that are used and not trained. They move with this one
            from device to device; no optimizer, no DDP and no initialiser
            sees them.
        recorders: Of modules of its own, such as a teacher; entered together
            with that of F.
        gives: Key of :meth:`losses`' signals under which others find what
            ``forward`` returned; ``None`` if nobody may.
        needs: Keys of signals that must be there.
    """

    uses_stem = False
    uses_image = False
    gives: str | None = None

    def __init__(
        self,
        taps: Sequence[Tap],
        head: nn.Module,
        num_classes: int,
        loss_weight: float = 1.0,
        dtype: str | None = 'float32',
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not is_weight(loss_weight):
            raise UsageError(
                f'guidance.loss_weight={loss_weight!r}; allowed '
                'are numbers from 0'
            )
        if dtype not in ('float32', None):
            raise UsageError(
                f"guidance.dtype={dtype!r}; allowed are 'float32' and None"
            )
        self.dtype = dtype
        self.frozen: list[nn.Module] = []
        self.needs: list[str] = []
        self.recorders: list[TapRecorder] = []
        self.register_buffer(
            'loss_weight', torch.tensor(float(loss_weight)), persistent=False
        )

    @classmethod
    def default_taps(cls, config: dict) -> str | None:
        """What ``taps`` is in a config that does not say it."""
        return 'auto'

    def attach(self, network: nn.Module, recorder: TapRecorder) -> TapRecorder:
        """Called once, after the guidance was built.

        Args:
            network: F, in floating point.
            recorder: Of the taps.

        Returns:
            What reads F's own pass for :meth:`forward`.
        """
        return recorder

    def prepare(self, network: nn.Module) -> None:
        """Called before the first step of a process, weights are loaded.

        Args:
            network: F, quantized, calibrated or not.
        """

    def forward(self, outputs: dict[str, Tensor]) -> Any:
        """What can be computed from tensors alone.

        Args:
            outputs: Name of a tap -> its tensor, (N, *shape of the tap).

        Returns:
            What :meth:`losses` takes; the logits (N, K) of the guidance's
            classifier if it has one.
        """
        raise NotImplementedError

    def losses(
        self, found: Any, signals: dict[str, Tensor], data_samples: list
    ) -> dict[str, Tensor]:
        """Losses, already weighted.

        Args:
            found: What :meth:`forward` gave.
            signals: ``'logits'`` of F, (N, K); ``'aux_logits'``, those of the
                auxiliary module, if there is one.
            data_samples: The samples of the batch, as the head of F gets.

        Returns:
            Name with ``loss`` in it -> tensor of shape (); other names are
            only logged.
        """
        raise NotImplementedError

    def loss(
        self,
        outputs: dict[str, Tensor],
        data_samples: list,
        signals: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """:meth:`forward` and :meth:`losses` in one."""
        return self.losses(self(outputs), signals or {}, data_samples)

    def precision(self) -> AbstractContextManager:
        """In which the guidance computes: without autocast, or as it is."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.loss_weight.device.type, enabled=False)

    def cast(self, x: Tensor) -> Tensor:
        """``x`` in the precision of the guidance."""
        return x if self.dtype is None else x.float()

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> 'Guidance':
        for module in self.frozen:
            module._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)


def student_logits(signals: dict[str, Tensor]) -> Tensor:
    """Logits of F, (N, K), float32.

    Raises:
        UsageError: If its head does not show them.
    """
    logits = signals[LOGITS]
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UsageError(
            'guidance: the head of F gives no logits (N, K) in training, so '
            'that nothing can be compared with them'
        )
    return logits.float()


def check_weights(
    weights: float | Sequence[float], taps: Sequence[Tap], where: str
) -> list[float]:
    """One weight for each tap.

    Args:
        weights: One for all, or one for each, not negative.
        taps: What is weighted.
        where: What to call them in a message.

    Raises:
        UsageError: If there are more or fewer weights than taps, or one is
            negative.
    """
    if isinstance(weights, (int, float)):
        weights = [weights] * len(taps)
    if not isinstance(weights, (list, tuple)):
        raise UsageError(
            f'{where}={weights!r}; allowed are a number from 0 and a list of '
            'them'
        )
    if len(weights) != len(taps):
        raise UsageError(
            f'{where}: {len(weights)} weights for {len(taps)} taps '
            f'({", ".join(tap.name for tap in taps)})'
        )
    if not all(map(is_weight, weights)):
        raise UsageError(
            f'{where}={list(weights)}; allowed are numbers from 0'
        )
    return list(weights)
