"""Deep supervision: a classifier on each tapped output."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmauxq.registry import MODELS

from .base import Guidance, TaskLoss, check_weights, linear_classifier, pool
from .taps import Tap


@MODELS.register_module()
class IntermediateClassifiers(Guidance):
    """A full-precision classifier on each tapped output.

    ::

        loss_p = loss_weight * alpha_p * L(classifier_p(pool(O_p)), targets)

    Sources: Lee et al., Deeply-Supervised Nets, arXiv:1409.5185; the rival
    "additional loss" of the auxiliary module's paper, arXiv:1903.11236.

    Args:
        taps, num_classes, loss_weight, dtype: See
            :class:`.base.Guidance`.
        alphas: Weight of each classifier, in the order of the taps, not
            negative; one number for all.
    """

    def __init__(
        self,
        taps: Sequence[Tap],
        num_classes: int,
        loss_weight: float = 1.0,
        alphas: float | Sequence[float] = 1.0,
        dtype: str | None = None,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(loss_weight, dtype, init_cfg)
        self.taps = list(taps)
        self.alphas = check_weights(alphas, taps, 'guidance.alphas')
        self.classifiers = nn.ModuleList(
            linear_classifier(tap.channels, num_classes) for tap in taps
        )

    def forward(self, outputs: dict[str, Tensor]) -> Tensor:
        """Logits of all classifiers, (P, N, K)."""
        logits, pairs = [], zip(self.taps, self.classifiers, strict=True)
        with self.precision():
            for tap, classifier in pairs:
                features = pool(self.cast(outputs[tap.name]), tap.layout)
                logits.append(classifier(features))
            return torch.stack(logits)

    def losses(
        self,
        output: Tensor,
        logits: Tensor | None,
        aux_logits: Tensor | None,
        task_loss: TaskLoss,
    ) -> dict[str, Tensor]:
        """``loss_TAP`` for each tap, from the logits (P, N, K)."""
        losses = {}
        places = zip(self.taps, self.alphas, output, strict=True)
        for tap, alpha, tap_logits in places:
            name = tap.name.removeprefix('backbone.')
            loss = task_loss(tap_logits) * alpha
            losses[f'loss_{name}'] = loss * self.loss_weight
        return losses
