"""Deep supervision: a classifier on each tapped output."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.registry import MODELS

from .adaptor import channels
from .base import Guidance
from .classifier import own_classifier, pool
from .taps import Tap


@MODELS.register_module()
class IntermediateClassifiers(Guidance):
    """A full-precision classifier on each tapped output.

    ::

        loss_p = loss_weight * alpha_p * L(classifier_p(pool(O_p)), targets)

    Sources: Lee et al., Deeply-Supervised Nets, arXiv:1409.5185; the rival
    "additional loss" of the auxiliary module's paper, arXiv:1903.11236.

    Args:
        taps: What is read from F.
        head: The head of F; its loss module is used here too.
        num_classes: K.
        loss_weight: Factor on all losses.
        alphas: Weight of each classifier, in the order of the taps, not
            negative; one number for all.

    Raises:
        UsageError: If there are more or fewer weights than taps, or one is
            negative.
    """

    def __init__(
        self,
        taps: Sequence[Tap],
        head: nn.Module,
        num_classes: int,
        loss_weight: float = 1.0,
        alphas: float | Sequence[float] = 1.0,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(taps, head, num_classes, loss_weight, init_cfg)
        if isinstance(alphas, (int, float)):
            alphas = [alphas] * len(taps)
        if len(alphas) != len(taps):
            raise UsageError(
                f'guidance.alphas: {len(alphas)} weights for {len(taps)} '
                f'taps ({", ".join(tap.name for tap in taps)})'
            )
        if any(
            not isinstance(alpha, (int, float)) or alpha < 0
            for alpha in alphas
        ):
            raise UsageError(
                f'guidance.alphas={list(alphas)}; allowed are numbers from 0'
            )
        self.taps = list(taps)
        self.alphas = list(alphas)
        self.classifiers = nn.ModuleList(
            own_classifier(head, channels(tap), num_classes) for tap in taps
        )

    def forward(self, outputs: dict[str, Tensor]) -> Tensor:
        """Logits of all classifiers, (P, N, K)."""
        return torch.stack(
            [
                classifier((pool(outputs[tap.name].float(), tap.layout),))
                for tap, classifier in zip(
                    self.taps, self.classifiers, strict=True
                )
            ]
        )

    def loss(self, outputs: dict[str, Tensor], data_samples: list) -> dict:
        """``loss_NAME`` for each tap, weighted."""
        losses = {}
        for tap, alpha, classifier, logits in zip(
            self.taps,
            self.alphas,
            self.classifiers,
            self(outputs),
            strict=True,
        ):
            name = tap.name.removeprefix('backbone.')
            loss = classifier._get_loss(logits, data_samples)['loss']
            losses[f'loss_{name}'] = loss * alpha * self.loss_weight
        return losses
