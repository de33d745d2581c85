"""Batches, and the next one ahead of its time."""

import numpy
import pytest
import torch
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.structures import DataSample

from mmauxq.batch_samples import BatchSamples
from mmauxq.engine import resumable_loops as loops
from mmauxq.engine.prefetch import (
    END,
    Batches,
    device_to_use,
    has_final_labels,
    label_preprocessor,
)
from tests.running import make_runner


def numbered(count, log):
    for i in range(count):
        log.append(i)
        yield dict(inputs=[torch.full((2,), i), torch.zeros(1)], other=i)


@pytest.mark.parametrize('device', [None, torch.device('cpu')])
def test_in_order_and_once_each(device):
    log = []
    batches = Batches(numbered(3, log), device)
    assert log == []
    batches.fetch()
    batches.fetch()
    assert log == [0]
    for i in range(3):
        batch = batches.take()
        assert batch['other'] == i and batch['inputs'][0].tolist() == [i, i]
        batches.fetch()
        assert log == list(range(min(i + 2, 3)))
    assert batches.take() is END and batches.take() is END


def test_a_batch_that_is_no_dict_is_left_alone():
    batch = (torch.zeros(2), 'label')
    assert Batches(iter([batch]), torch.device('cpu')).take() is batch


CUTMIX = dict(type='CutMix', alpha=1.0)


def labelled(count, size=2):
    return [
        dict(
            inputs=torch.full((size, 1, 8, 8), i, dtype=torch.uint8),
            data_samples=[
                DataSample().set_gt_label(i + j) for j in range(size)
            ],
        )
        for i in range(count)
    ]


def test_labels_are_prepared_ahead_and_images_in_their_time():
    class Counting(ClsDataPreprocessor):
        seen = []

        def forward(self, data, training=False):
            self.seen.append(len(data['inputs']))
            return super().forward(data, training)

    module = Counting(mean=[1.0], std=[2.0])
    batches = Batches(iter(labelled(3)), torch.device('cpu'), module)
    with batches.preprocessing():
        for i in range(3):
            batch = batches.take()
            found = module(batch, True)
            batches.fetch()
            assert found['inputs'].eq((i - 1) / 2).all()
            labels = [s.gt_label.item() for s in found['data_samples']]
            assert labels == [i, i + 1]
        # another batch, as a repeated step or a validation has
        other = module(labelled(8)[7], False)
        assert other['data_samples'][1].gt_label.item() == 8
    assert module.seen == [0, 2, 0, 2, 0, 2, 2]
    assert 'forward' not in vars(module)


@pytest.mark.parametrize('settings', [{}, dict(to_rgb=True)])
def test_images_and_labels_one_by_one_are_handled_together(settings):
    """The result is that of MMPretrain's preprocessor, to the bit."""

    def make():
        images = torch.arange(6 * 48).reshape(6, 3, 4, 4) % 256
        samples = labelled(1, 6)[0]['data_samples']
        return dict(inputs=list(images.byte()), data_samples=samples)

    module = ClsDataPreprocessor([1.0, 2, 3], [7.0, 3, 9], **settings)
    wanted, seen = module(make(), True), []
    forward = ClsDataPreprocessor.forward
    batches = Batches(iter([make()]), None, module)
    batches._preprocess = lambda data, training: (
        seen.append(data), forward(module, data, training)
    )[1]  # fmt: skip
    with batches.preprocessing():
        found = module(batches.take(), True)
    assert [list(data) for data in seen] == [['inputs']]
    assert torch.equal(found['inputs'], wanted['inputs'])
    for one, other in zip(
        found['data_samples'], wanted['data_samples'], strict=True
    ):
        assert torch.equal(one.gt_label, other.gt_label)


def test_which_labels_stay_as_they_are():
    plain = ClsDataPreprocessor()
    samples = labelled(1)[0]['data_samples']
    assert has_final_labels(plain, samples)
    one_hot = ClsDataPreprocessor(to_onehot=True, num_classes=10)
    assert not has_final_labels(one_hot, samples)
    assert not has_final_labels(plain, [*samples, DataSample()])
    assert not has_final_labels(plain, [DataSample()])
    assert not has_final_labels(plain, None)
    scored = DataSample().set_gt_label(1).set_gt_score(torch.ones(10))
    assert not has_final_labels(plain, [scored])


def mixing():
    augments = [dict(type='Mixup', alpha=0.8), CUTMIX]
    return ClsDataPreprocessor(
        num_classes=10, batch_augments=dict(augments=augments)
    )


def test_mixed_images_have_the_labels_and_random_numbers_of_their_time():
    """One-hot labels come ahead, what is drawn does not."""
    found = []
    for ahead in (False, True):
        module = mixing()
        batches = Batches(
            iter(labelled(4, 6)),
            torch.device('cpu') if ahead else None,
            module if ahead else None,
        )
        torch.manual_seed(0)
        numpy.random.seed(0)
        with batches.preprocessing():
            for _ in range(4):
                batch = batches.take()
                assert ('gt_score' in batch['data_samples'][0]) == ahead
                done = module(batch, True)
                batches.fetch()
                scores = [s.gt_score for s in done['data_samples']]
                found.append((done['inputs'], torch.stack(scores)))
    mixed = 0
    for (images, scores), (others, theirs) in zip(
        found[:4], found[4:], strict=True
    ):
        assert torch.equal(images, others)
        assert torch.equal(scores, theirs)
        mixed += (scores > 0).sum().item() > 6
    assert mixed


def test_a_preprocessor_that_is_not_known_is_not_asked_ahead():
    class Other(ClsDataPreprocessor):
        pass

    model = torch.nn.Module()
    assert label_preprocessor(model) is None
    for known in (ClsDataPreprocessor(), mixing()):
        model.data_preprocessor = known
        assert label_preprocessor(model) is known
    model.data_preprocessor = Other()
    assert label_preprocessor(model) is None


@pytest.mark.parametrize(
    'train_cfg',
    [
        dict(type='mmauxq.EpochLoop', max_epochs=2),
        dict(type='mmauxq.IterLoop', max_iters=8),
    ],
)
@pytest.mark.parametrize('workers', [0, 2])
def test_training_is_the_same_ahead_of_time(
    tmp_path, monkeypatch, train_cfg, workers
):
    """On a CPU nothing is fetched ahead; here it is made to."""
    results, fetched = [], []
    fetch = Batches.fetch
    for ahead in (False, True):
        if ahead:
            monkeypatch.setattr(
                loops, 'device_of', lambda model: torch.device('cpu')
            )
            monkeypatch.setattr(
                Batches,
                'fetch',
                lambda self: (fetched.append(self._next is None), fetch(self)),
            )
        runner = make_runner(
            tmp_path / f'{ahead}',
            train_cfg=train_cfg,
            workers=workers,
        )
        runner.train()
        results.append(runner.model.state_dict())
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name
    # one that comes too early for each that is asked for in its time
    assert fetched.count(False) in ((7, 8) if workers else (0,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_images_are_on_the_gpu():
    device = torch.device('cuda', 0)
    images = [torch.full((64, 3, 64, 64), i).pin_memory() for i in range(4)]
    batches = Batches(iter([dict(inputs=x) for x in images]), device)
    for expected in images:
        batches.fetch()
        found = batches.take()['inputs']
        assert found.device == device
        assert torch.equal(found.cpu(), expected)


def test_the_device_of_a_preprocessor_has_a_number(monkeypatch):
    """MMEngine moves models to ``cuda``, and tensors are on ``cuda:0``."""
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 3)
    module = ClsDataPreprocessor()
    for given, wanted in (
        ('cpu', 'cpu'), ('cuda', 'cuda:3'), ('cuda:1', 'cuda:1'),
    ):  # fmt: skip
        module._device = torch.device(given)
        assert device_to_use(module) == torch.device(wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize('name', ['cuda', 'cuda:0'])
def test_labels_in_one_tensor_stay_there_on_the_gpu(name):
    module = ClsDataPreprocessor(mean=[1.0], std=[2.0]).to(name)
    labels = torch.tensor([3, 1]).pin_memory()
    data = dict(
        inputs=torch.zeros(2, 1, 8, 8), data_samples=BatchSamples(labels)
    )
    batches = Batches(iter([data]), torch.device('cuda', 0), module)
    with batches.preprocessing():
        found = module(batches.take(), True)['data_samples'].labels
    assert found.is_cuda and found.tolist() == [3, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.parametrize('name', ['cuda', 'cuda:0'])
def test_labels_are_on_the_gpu(name):
    device = torch.device('cuda', 0)
    module = ClsDataPreprocessor(mean=[1.0], std=[2.0]).to(name)
    batches = Batches(iter(labelled(3)), device, module)
    with batches.preprocessing():
        for i in range(3):
            batch = batches.take()
            label = batch['data_samples'][1].gt_label
            assert label.device == device and label.item() == i + 1
            found = module(batch, True)
            assert found['inputs'].cpu().eq((i - 1) / 2).all()
            assert found['data_samples'][1].gt_label is label
            batches.fetch()
