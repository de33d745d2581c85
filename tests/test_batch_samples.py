import copy

import numpy as np
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


@pytest.mark.parametrize('scored', [False, True])
@pytest.mark.parametrize('guidance', ['aux', 'dsn'])
def test_losses_and_gradients_are_those_of_single_samples(guidance, scored):
    images, samples = batch(4)
    labels = torch.cat([sample.gt_label for sample in samples])
    first = joint_qat(guidance=GUIDANCE[guidance])
    second = copy.deepcopy(first)
    together = BatchSamples(labels)
    if scored:
        scores = torch.rand(4, first.architecture.head.num_classes).softmax(1)
        together = together.with_scores(scores)
        for sample, score in zip(samples, scores, strict=True):
            sample.set_gt_score(score)
    found = first.loss(images, together)
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
    scores = torch.rand(4, 5)
    for targets in (scores, BatchSamples(LABELS).with_scores(scores)):
        (one,) = as_samples(classifier, targets)
        assert one.gt_label is scores
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


MIXING = dict(
    augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)],
    probs=[0.4, 0.4],
)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize(
    'settings', [dict(to_onehot=True), dict(batch_augments=MIXING)]
)
def test_scores_are_those_of_mmpretrain_and_stay_together(settings, training):
    """Values, kinds and random numbers are the same, to the bit."""
    kinds = set()
    for seed in range(8):
        done = []
        for together in (False, True):
            # MMPretrain changes the lists that it is given
            module = ClsDataPreprocessor(
                num_classes=5, **copy.deepcopy(settings)
            )
            data = dict(
                inputs=torch.arange(4 * 64).reshape(4, 1, 8, 8).byte(),
                data_samples=BatchSamples(LABELS, [dict(name='a')] * 4),
            )
            batches = Batches(iter([data]), torch.device('cpu'), module)
            torch.manual_seed(seed)
            np.random.seed(seed)
            if together:
                with batches.preprocessing():
                    done.append(module(batches.take(), training))
            else:
                done.append(module(data, training))
        wanted, found = done
        scores = found['data_samples'].targets
        kinds.add((scores.dtype, (scores > 0).sum().item() > 4))
        assert torch.equal(found['inputs'], wanted['inputs'])
        assert found['data_samples'].labels is None
        for row, one, other in zip(
            scores, found['data_samples'], wanted['data_samples'], strict=True
        ):
            assert row.dtype == one.gt_score.dtype == other.gt_score.dtype
            assert torch.equal(row, other.gt_score)
            assert torch.equal(one.gt_score, other.gt_score)
            assert torch.equal(one.gt_label, other.gt_label)
            assert one.name == other.name == 'a'
        assert found['data_samples'].targets is None
    mixed = {(torch.float32, True), (torch.float32, False)}
    plain = {(torch.int64, False)}
    augments = training and 'batch_augments' in settings
    assert kinds == (mixed if augments else plain)


def test_without_a_number_of_classes_mmpretrain_says_so():
    module = ClsDataPreprocessor(to_onehot=True)
    data = dict(
        inputs=torch.zeros(4, 1, 2, 2), data_samples=BatchSamples(LABELS)
    )
    batches = Batches(iter([data]), None, module)
    with (
        batches.preprocessing(),
        pytest.raises(AssertionError, match='num_classes'),
    ):
        module(batches.take(), True)


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
