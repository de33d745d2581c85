import cv2
import numpy as np
import pytest

from mmauxq.datasets import read_images as module
from mmauxq.datasets.read_images import read_images
from mmauxq.errors import UsageError


@pytest.fixture
def files(tmp_path):
    images = np.random.default_rng(0).integers(
        256, size=(7, 4, 5, 3), dtype=np.uint8
    )
    paths = [str(tmp_path / f'{i}.png') for i in range(7)]
    for path, image in zip(paths, images, strict=True):
        cv2.imwrite(path, image)
    return paths, images


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
@pytest.mark.parametrize('processes', [1, 2, 9])
def test_images_are_in_the_order_of_files(files, processes, monkeypatch):
    monkeypatch.setattr(module, 'CHUNK', 3)
    paths, images = files
    assert (read_images(paths, processes) == images).all()


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
@pytest.mark.parametrize('processes', [1, 2])
def test_an_odd_file_is_named(files, processes, monkeypatch, tmp_path):
    monkeypatch.setattr(module, 'CHUNK', 3)
    paths, images = files
    cv2.imwrite(paths[5], images[5][:3])
    with pytest.raises(
        UsageError,
        match='5 x 4 pixels as the first, got 5 x 3 pixels in .*5.png',
    ):
        read_images(paths, processes)
    (tmp_path / '5.png').write_text('no image')
    with pytest.raises(UsageError, match='5.png is no image'):
        read_images(paths, processes)
    (tmp_path / '5.png').unlink()
    with pytest.raises(UsageError, match='5.png does not exist'):
        read_images(paths, processes)


def test_memory_is_looked_at_before_files_are_read(files, monkeypatch):
    paths, _ = files
    monkeypatch.setattr(module, '_free_memory', lambda: 7 * 4 * 5 * 3 - 1)
    monkeypatch.setattr(module, '_of_size', None)
    with pytest.raises(
        UsageError, match='7 images of 5 x 4 pixels need 0.0 GiB of memory'
    ):
        read_images(paths)
    monkeypatch.undo()
    assert module._free_memory() > 2**20
