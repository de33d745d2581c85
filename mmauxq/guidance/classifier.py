"""The classifiers that guidance has of its own."""

import copy

import torch.nn.functional as F
from mmpretrain.models import MultiLabelClsHead
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor, nn

from mmauxq.errors import UsageError

from .taps import CHANNELS_LAST, MAP


def pool(features: Tensor, layout: str) -> Tensor:
    """The mean over all positions: (N, C).

    Args:
        features: (N, C, H, W), (N, H, W, C) or (N, L, C).
        layout: Which of them, see :class:`Tap`.
    """
    if layout == MAP:
        return F.adaptive_avg_pool2d(features, 1).flatten(1)
    return features.mean((1, 2) if layout == CHANNELS_LAST else 1)


def own_classifier(
    head: nn.Module, in_channels: int, num_classes: int
) -> nn.Module:
    """A linear head whose loss is of the kind of ``head``'s.

    Args:
        head: The head of F. Its loss module is copied, not shared: it may
            have state.
        in_channels: Width of the pooled features.
        num_classes: K.

    Raises:
        UsageError: If ``head`` has no loss module.
    """
    if not isinstance(getattr(head, 'loss_module', None), nn.Module):
        raise UsageError(
            f'architecture.head: {type(head).__name__} has no loss of its own '
            'that guidance could use; allowed are heads with a loss_module'
        )
    kind = 'LinearClsHead'
    if isinstance(head, MultiLabelClsHead):
        kind = 'MultiLabelLinearClsHead'
    own = MMPRETRAIN_MODELS.build(
        dict(
            type=kind,
            num_classes=num_classes,
            in_channels=in_channels,
            _scope_='mmpretrain',
        )
    )
    own.loss_module = copy.deepcopy(head.loss_module)
    return own
