"""The losses of mmpretrain's heads, and the logits that they start from."""

from typing import Any

from mmpretrain.models import ClsHead, ImageClassifier, MultiLabelClsHead
from torch import Tensor, nn

from mmauxq.forward_hooks import forward_hooks

PLAIN_LOSSES = (ClsHead.loss, MultiLabelClsHead.loss)
"""``head.loss`` that is ``head._get_loss(head(features), data_samples)``."""


def is_plain(classifier: nn.Module) -> bool:
    """Whether the loss is computed from the logits, and nothing else."""
    return (
        type(classifier).loss is ImageClassifier.loss
        and type(classifier.head).loss in PLAIN_LOSSES
    )


def head_logits(head: nn.Module, features: Any) -> Any:
    """The logits that a head trains with, (N, K)."""
    try:
        return head(features)
    except NotImplementedError:
        # Heads with a second output for a teacher (LeViT, EfficientFormer)
        # refuse to train without one. The average that they predict with
        # learns the targets, as in DeiTClsHead.
        training, head.training = head.training, False
        try:
            return head(features)
        finally:
            head.training = training


def own_loss(
    classifier: nn.Module, inputs: Tensor, data_samples: list | None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The losses of a classifier that is not plain, from images (N, C, H, W);
    and its logits, (N, K), if its head shows them."""
    head, outputs = classifier.head, []
    with forward_hooks(
        [('head', head)], lambda *call: outputs.append(call[-1])
    ):
        if type(classifier).loss is not ImageClassifier.loss:
            losses = classifier(inputs, data_samples, mode='loss')
        else:
            features = classifier.extract_feat(inputs)
            try:
                losses = head.loss(features, data_samples)
            except NotImplementedError:
                logits = head_logits(head, features)
                losses = ClsHead._get_loss(head, logits, data_samples)
    return losses, outputs[-1] if outputs else None
