"""The data loader of a recipe on real files."""

import numpy as np
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
    before = files[0].stat().st_mtime_ns
    loader.make_images(tmp_path, 40)
    assert files[0].stat().st_mtime_ns == before
