"""Any network from images to logits, as a classifier of MMPretrain."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mmpretrain.models import ClsHead, ImageClassifier
from torch import Tensor, nn

from mmauxq.errors import UsageError

Loss = Callable[[Tensor, Any], Tensor]
"""From logits (N, K) and the targets of a batch to a loss, ()."""


class PlainClassifier(ImageClassifier):
    """A classifier whose backbone is a whole network.

    Args:
        network: From images (N, C, H, W) to logits (N, K).
        loss: From logits and targets to a loss; cross entropy by default.
    """

    def __init__(self, network: nn.Module, loss: Loss | None = None) -> None:
        super().__init__(network, head=PlainHead(loss or cross_entropy))


class PlainHead(ClsHead):
    """The head of a network that ends in logits: it has the loss alone."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss=_Loss(loss))

    def forward(self, logits: Tensor) -> Tensor:
        """The logits, as they are; a UsageError if they are none."""
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            got = f'a {type(logits).__name__}'
            if isinstance(logits, Tensor):
                got = f'shape {tuple(logits.shape)}'
            raise UsageError(
                f'net: expected logits of shape (N, K), got {got}; wrap it in '
                'a module that returns the logits alone'
            )
        return logits

    def _get_loss(
        self, logits: Tensor, targets: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        return dict(loss=self.loss_module(logits, targets))


class _Loss(nn.Module):
    def __init__(self, function: Loss) -> None:
        super().__init__()
        self.function = function

    def forward(self, logits: Tensor, targets: Any) -> Tensor:
        loss = self.function(logits, targets)
        if not isinstance(loss, Tensor) or loss.dim():
            got = tuple(loss.shape) if isinstance(loss, Tensor) else loss
            raise UsageError(
                f'loss: expected a tensor of shape (), got {got!r}'
            )
        return loss


def cross_entropy(logits: Tensor, targets: Any) -> Tensor:
    """Cross entropy, (), of logits (N, K) with the indices of classes (N,),
    int64, or with probabilities (N, K).

    Raises:
        UsageError: If ``targets`` are neither.
    """
    indices = probabilities = False
    if isinstance(targets, Tensor):
        indices = (
            targets.dtype == torch.int64 and targets.shape == logits.shape[:1]
        )
        probabilities = (
            targets.is_floating_point() and targets.shape == logits.shape
        )
        # to look at them on a GPU would make the host wait
        if indices and not targets.is_cuda and len(targets):
            indices = 0 <= targets.min() <= targets.max() < logits.shape[1]
    if not (indices or probabilities):
        count, classes = logits.shape
        raise UsageError(
            f'targets: expected indices of {classes} classes, int64 of shape '
            f'({count},), or probabilities of shape ({count}, {classes}), got '
            f'{_describe(targets)}'
        )
    return F.cross_entropy(logits.float(), targets)


def _describe(targets: Any) -> str:
    if not isinstance(targets, Tensor):
        return f'a {type(targets).__name__}'
    text = f'{targets.dtype} of shape {tuple(targets.shape)}'
    if targets.numel() and not targets.is_cuda:
        text += f' from {targets.min()} to {targets.max()}'
    return text


def check_network(network: Any) -> None:
    """Raise a UsageError if this is no network."""
    if not isinstance(network, nn.Module):
        got = network if isinstance(network, type) else type(network)
        raise UsageError(
            'net: expected a torch.nn.Module from images to logits, got '
            f'{got.__name__}'
        )


def as_classifier(
    network: nn.Module, loss: Loss | None = None
) -> ImageClassifier:
    """``network`` as a classifier: itself if it is one of MMPretrain's.

    Raises:
        UsageError: If it is one and ``loss`` is given, or it is no network.
    """
    check_network(network)
    if not isinstance(network, ImageClassifier):
        return PlainClassifier(network, loss)
    if loss is not None:
        raise UsageError(
            'loss: expected None for a classifier of MMPretrain, whose head '
            f'has one, got {loss!r}'
        )
    return network


def copied_classifier(
    network: nn.Module, loss: Loss | None = None
) -> ImageClassifier:
    """:func:`as_classifier` of a copy of ``network`` on the CPU."""
    check_network(network)
    return as_classifier(copy.deepcopy(network).cpu(), loss)


def bare_network(classifier: nn.Module) -> nn.Module:
    """What :func:`as_classifier` was given."""
    if isinstance(classifier, PlainClassifier):
        return classifier.backbone
    return classifier
