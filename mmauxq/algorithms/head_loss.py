"""The losses of mmpretrain's heads, and the logits that they start from."""

from typing import Any

import torch
from mmpretrain.models import ClsHead, ImageClassifier, MultiLabelClsHead
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmauxq.batch_samples import BatchSamples, labelled
from mmauxq.errors import UsageError
from mmauxq.forward_hooks import forward_hooks

from .plain_classifier import PlainHead

PLAIN_LOSSES = (ClsHead.loss, MultiLabelClsHead.loss)
"""``head.loss`` that is ``head._get_loss(head(features), data_samples)``."""


def is_plain(classifier: nn.Module) -> bool:
    """Whether the loss is computed from the logits, and nothing else."""
    return (
        type(classifier).loss is ImageClassifier.loss
        and type(classifier.head).loss in PLAIN_LOSSES
    )


def check_task_loss(head: nn.Module) -> None:
    """Raise a UsageError if a head has no loss that takes logits."""
    if not isinstance(getattr(head, 'loss_module', None), nn.Module):
        raise UsageError(
            'architecture.head: expected a head with a loss_module, which '
            f'guidance uses too, got a {type(head).__name__}'
        )


def check_for_several_labels(guidance: nn.Module, num_classes: int) -> None:
    """Raise a UsageError if a distance of logits (N, K) sees nothing but their
    softmax, which assumes one label for each image."""
    first, second = torch.randn(
        2, 4, num_classes, generator=torch.Generator().manual_seed(0)
    )
    for name in ('logits', 'guides_aux', 'guides_student'):
        distance = getattr(guidance, name, None)
        if distance is None:
            continue
        before, after = distance(first, second), distance(first + 1, second)
        if torch.allclose(before, after, atol=1e-5):
            raise UsageError(
                f'guidance.{name}: expected a distance for a head of several '
                'labels, such as mmrazor.L2Loss, got '
                f'{type(distance).__name__}, which compares softmax '
                'probabilities'
            )


def as_samples(classifier: nn.Module, targets: Any) -> Any:
    """Targets as the head of a classifier takes them.

    Args:
        classifier: Of MMPretrain.
        targets: Data samples, or indices of classes (N,), int64, or scores
            (N, K), which a head of several labels takes for which labels an
            image has.

    Returns:
        Data samples for a head of MMPretrain, ``targets`` for another one.
        A head that would put the labels or scores of all samples together,
        for each of its losses anew, is given one sample that has them all.

    Raises:
        UsageError: If they are none of these.
    """
    head, made = classifier.head, isinstance(targets, BatchSamples)
    values = targets.targets if made else targets
    if not isinstance(values, Tensor) or isinstance(head, PlainHead):
        return targets
    indices = values.dtype == torch.int64 and values.dim() == 1
    scores = values.is_floating_point() and values.dim() == 2
    if made or indices or scores:
        # such a head concatenates what it finds as labels
        together = type(head)._get_loss is ClsHead._get_loss
        if together and is_plain(classifier):
            return [labelled(values)]
    if made:
        return targets
    if indices and not isinstance(head, MultiLabelClsHead):
        return list(BatchSamples(values))
    if scores:
        return [DataSample().set_gt_score(target) for target in values]
    raise UsageError(
        'targets: expected indices of classes, int64 of shape (N,), or scores '
        f'of shape (N, K), got {values.dtype} of shape '
        f'{tuple(values.shape)}'
    )


def task_loss(
    head: nn.Module, data_samples: Any, logits: Tensor, own: Any = None
) -> Tensor:
    """The loss of a head on logits (N, K) that need not be its own, ().

    Args:
        head: Of the classifier.
        data_samples: As the head takes them.
        logits: Of another classifier.
        own: What the head gave, if it is known. A head that gives several
            logits, such as Conformer's, has a loss for all of them.
    """
    if type(head).loss in PLAIN_LOSSES and not isinstance(own, (tuple, list)):
        compute = type(head)._get_loss
    elif isinstance(head, MultiLabelClsHead):
        compute = MultiLabelClsHead._get_loss
    else:
        compute = ClsHead._get_loss
    return compute(head, logits, data_samples)['loss']


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
