"""The data loader of a recipe on real files."""

import time

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import loader


def test_images_have_detail_and_differ():
    first, again, other = (
        np.asarray(loader.make_image(number), dtype=float)
        for number in (0, 0, 1)
    )
    assert first.shape == (375, 500, 3)
    assert (first == again).all() and (first != other).mean() > 0.9
    neighbours = np.corrcoef(first[:, 1:].ravel(), first[:, :-1].ravel())
    assert 0.8 < neighbours[0, 1] < 0.99


def test_the_loader_alone(tmp_path):
    row = loader.measure('r18', 1, tmp_path, batches=1, count=40)
    files = sorted(tmp_path.rglob('*.jpeg'))
    assert len(files) == 40
    with Image.open(files[0]) as image:
        assert (image.format, image.size) == ('JPEG', (500, 375))
    assert 80 < row['kilobytes'] < 120
    assert row['shape'] == [3, 224, 224] and row['batch'] == 32
    assert row['images_per_s'] == row['per_worker'] >= 0
    assert row['processor_ms'][0] > 0 and row['of_opencv'] == [1, 1, 1]
    before = files[0].stat().st_mtime_ns
    loader.make_images(tmp_path, 40)
    assert files[0].stat().st_mtime_ns == before


def test_a_decoder_takes_turns_with_opencv(tmp_path):
    row = loader.measure('r18', 1, tmp_path, 5, 40, decoder='opencv-stacked')
    assert row['decoder'] == 'opencv-stacked' and row['repeats'] == 2
    assert row['shape'] == [3, 224, 224]
    median, low, high = row['of_opencv']
    assert 0 < low <= median <= high


class Spin(list):
    """Batches whose making takes processor time, or none."""

    def __init__(self, seconds):
        super().__init__([dict(inputs=np.zeros((2, 3, 4, 4)))])
        self.seconds = seconds

    def __iter__(self):
        end = time.process_time() + self.seconds
        while time.process_time() < end:
            pass
        return super().__iter__()


def test_processor_time_of_an_arm_is_its_own():
    busy, idle = loader.Arm(Spin(0.2), 2), loader.Arm(Spin(0), 2)
    for arm in (busy, idle, idle, busy):
        arm.take_turn()
    assert min(busy.processor) >= 0.2 and sum(idle.processor) < 0.1
    assert busy.shape == [3, 4, 4]
    with pytest.raises(RuntimeError, match='expected 3 images, got 2'):
        loader.Arm(Spin(0), 3).take_turn()


def test_processor_time_of_loader_processes_is_counted():
    class Work(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            list(Spin(0.1))
            return dict(inputs=torch.zeros(1))

    batches = torch.utils.data.DataLoader(
        Work(), 2, num_workers=1, persistent_workers=True
    )
    arm = loader.Arm(batches, 2)
    arm.take_turn()
    arm.take_turn()
    assert arm.processor[1] >= 0.2
