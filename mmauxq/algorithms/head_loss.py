"""The losses of mmpretrain's heads, and the logits that they start from."""

from typing import Any

from mmpretrain.models import ClsHead, ImageClassifier, MultiLabelClsHead
from torch import Tensor, nn

PLAIN_LOSSES = (ClsHead.loss, MultiLabelClsHead.loss)
"""``head.loss`` that is ``head._get_loss(head(features), data_samples)``."""


def is_plain(classifier: nn.Module) -> bool:
    """Whether the loss is computed from the logits, and nothing else."""
    return (
        type(classifier).loss is ImageClassifier.loss
        and type(classifier.head).loss in PLAIN_LOSSES
    )


def head_logits(head: nn.Module, features: Any) -> Any:
    """The logits that a head trains with, (N, K).

    Heads with a second output for a teacher (LeViT, EfficientFormer) decline
    to train without one. The average that they predict with learns the
    targets, as in DeiTClsHead.
    """
    try:
        return head(features)
    except NotImplementedError:
        training, head.training = head.training, False
        try:
            return head(features)
        finally:
            head.training = training


def own_loss(
    classifier: nn.Module, inputs: Tensor, data_samples: list | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The losses of a classifier that is not plain.

    Args:
        classifier: Of mmpretrain.
        inputs: (N, C, H, W).
        data_samples: With the targets.

    Returns:
        Its losses; and its logits, (N, K), if its head shows them.
    """
    outputs: list = []
    handle = classifier.head.register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    try:
        losses = _loss(classifier, inputs, data_samples)
    finally:
        handle.remove()
    return losses, outputs[-1] if outputs else None


def _loss(
    classifier: nn.Module, inputs: Tensor, data_samples: list | None
) -> dict[str, Tensor]:
    if type(classifier).loss is not ImageClassifier.loss:
        return classifier(inputs, data_samples, mode='loss')
    features = classifier.extract_feat(inputs)
    try:
        return classifier.head.loss(features, data_samples)
    except NotImplementedError:
        return ClsHead._get_loss(
            classifier.head,
            head_logits(classifier.head, features),
            data_samples,
        )
