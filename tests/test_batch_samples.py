import copy

import pytest
import torch
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.structures import DataSample

from mmauxq.algorithms.head_loss import as_samples
from mmauxq.batch_samples import BatchSamples, labelled, stacked
from mmauxq.engine.prefetch import Batches
from mmauxq.engine.running import tensors_in

from .networks import batch, joint_qat

LABELS = torch.tensor([3, 1, 4, 1])
GUIDANCE = dict(
    aux=dict(type='mmauxq.AuxAdaptorAggregator'),
    dsn=dict(type='mmauxq.IntermediateClassifiers'),
)


def test_samples_are_made_when_one_is_looked_at():
    samples = BatchSamples(LABELS)
    assert len(samples) == 4 and samples.labels is LABELS
    assert [sample.gt_label.tolist() for sample in samples] == [
        [3], [1], [4], [1]
    ]  # fmt: skip
    assert samples.labels is None
    samples[2].set_gt_label(0)
    assert [int(sample.gt_label) for sample in samples] == [3, 1, 0, 1]
    with pytest.raises(IndexError):
        samples[4]


def test_the_labels_are_found_among_the_tensors_of_a_batch():
    samples = BatchSamples(LABELS)
    found = list(tensors_in(dict(inputs=torch.ones(1), data_samples=samples)))
    assert found[1] is LABELS and len(found) == 2
    list(samples)
    assert list(tensors_in(samples)) == []


def test_what_samples_say_beside_their_labels_is_kept():
    samples = BatchSamples(
        LABELS[:2], [dict(img_path='a'), dict(img_path='b')]
    )
    assert [sample.img_path for sample in samples] == ['a', 'b']


def test_moved_samples_keep_what_was_changed():
    samples = BatchSamples(LABELS, [dict(img_path=str(i)) for i in range(4)])
    moved = samples.to(torch.device('meta'))
    assert moved.labels.is_meta and samples.labels is LABELS
    assert len(moved) == 4 and moved._metainfo == samples._metainfo
    samples[0].set_gt_label(7)
    assert samples.to(torch.device('meta')) is samples
    assert int(samples[0].gt_label) == 7


@pytest.mark.parametrize('guidance', ['aux', 'dsn'])
def test_losses_and_gradients_are_those_of_single_samples(guidance):
    images, samples = batch(4)
    labels = torch.cat([sample.gt_label for sample in samples])
    first = joint_qat(guidance=GUIDANCE[guidance])
    second = copy.deepcopy(first)
    found = first.loss(images, BatchSamples(labels))
    wanted = second.loss(images, samples)
    assert found.keys() == wanted.keys() and len(found) > 1
    for name, loss in found.items():
        assert torch.equal(loss, wanted[name]), name
    sum(found.values()).backward()
    sum(wanted.values()).backward()
    for (name, one), other in zip(
        first.named_parameters(), second.parameters(), strict=True
    ):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad), name


def test_a_head_that_puts_labels_together_is_given_them_together():
    classifier = joint_qat().architecture
    (one,) = as_samples(classifier, BatchSamples(LABELS))
    assert one.gt_label is LABELS
    (one,) = as_samples(classifier, LABELS)
    assert one.gt_label is LABELS
    seen = BatchSamples(LABELS)
    list(seen)
    assert as_samples(classifier, seen) is seen


def test_a_head_with_a_loss_of_its_own_is_given_each_sample():
    classifier = joint_qat().architecture

    class Own(type(classifier.head)):
        def loss(self, features, data_samples):
            return super().loss(features, data_samples)

    classifier.head.__class__ = Own
    samples = BatchSamples(LABELS)
    assert as_samples(classifier, samples) is samples
    assert [int(s.gt_label) for s in as_samples(classifier, LABELS)] == [
        3, 1, 4, 1
    ]  # fmt: skip


def test_a_preprocessor_need_not_handle_them():
    """It would put the labels together and take them apart again."""
    module = ClsDataPreprocessor()
    images = torch.arange(4 * 4).reshape(4, 1, 2, 2).byte()
    samples = BatchSamples(LABELS)
    batches = Batches(
        iter([dict(inputs=images, data_samples=samples)]),
        torch.device('cpu'),
        module,
    )
    with batches.preprocessing():
        done = module(batches.take(), True)
    assert done['data_samples'] is samples and samples.labels is LABELS
    assert torch.equal(done['inputs'], images.float())


def test_one_hot_labels_are_still_made():
    module = ClsDataPreprocessor(to_onehot=True, num_classes=5)
    samples = BatchSamples(LABELS)
    batches = Batches(
        iter([dict(inputs=torch.zeros(4, 1, 2, 2), data_samples=samples)]),
        torch.device('cpu'),
        module,
    )
    with batches.preprocessing():
        done = module(batches.take(), True)
    scores = torch.stack([each.gt_score for each in done['data_samples']])
    assert torch.equal(scores.argmax(1), LABELS)


def test_mmpretrains_preprocessor_takes_them():
    done = ClsDataPreprocessor()(
        dict(inputs=torch.zeros(4, 1, 2, 2), data_samples=BatchSamples(LABELS))
    )
    labels = [int(sample.gt_label) for sample in done['data_samples']]
    assert labels == LABELS.tolist()


def test_labels_of_a_sample_keep_their_tensor():
    sample = labelled(LABELS)
    assert isinstance(sample, DataSample) and sample.gt_label is LABELS


def test_images_that_differ_are_left_one_by_one():
    alike = [torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]
    assert stacked(alike).shape == (2, 1, 2, 2)
    for other in (torch.zeros(1, 2, 3), torch.zeros(1, 2, 2).byte(), 'x'):
        images = [*alike, other]
        assert stacked(images) is images
    batch = torch.zeros(2, 1, 2, 2)
    assert stacked(batch) is batch
