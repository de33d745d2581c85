"""What each decoder gives, and what is said where one cannot run."""

import sys

import mmcv
import numpy as np
import pytest
import torch
from mmengine.registry import TRANSFORMS, init_default_scope
from torchvision.io import read_file

from benchmarks import decoders, loader, recipes
from mmauxq.errors import UsageError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return loader.make_images(tmp_path_factory.mktemp('images'), 4)


@pytest.fixture
def image(folder):
    """Decodes a file by the name of the decoder."""
    path = next(iter(sorted(folder.rglob('*.jpeg'))))
    init_default_scope('mmpretrain')

    def decode(decoder):
        transform = TRANSFORMS.build(decoders.LOADS[decoder])
        return transform(dict(img_path=str(path)))

    return decode


def test_torchvision_decodes_to_the_pixels_of_opencv(image):
    ours, reference = image('torchvision'), image('opencv')
    assert ours['img_shape'] == reference['img_shape'] == (375, 500)
    assert np.array_equal(ours['img'], reference['img'])


def test_turbojpeg_decodes_to_the_pixels_of_opencv(image):
    pytest.importorskip('turbojpeg')
    try:
        decoders.check('turbojpeg')
    except UsageError as error:
        pytest.skip(str(error))
    assert np.array_equal(image('turbojpeg')['img'], image('opencv')['img'])


@pytest.mark.parametrize(
    'decoder, shape',
    [('opencv-half', (188, 250, 3)), ('opencv-quarter', (94, 125, 3))],
)
def test_reduced_decoding(image, decoder, shape):
    reduced, whole = image(decoder)['img'], image('opencv')['img']
    assert reduced.shape == shape
    smaller = mmcv.imresize(whole, shape[1::-1], interpolation='area')
    error = np.abs(reduced.astype(int) - smaller)
    assert error.mean() < 6 < np.abs(whole.astype(int) - 128).mean()


def test_what_a_gpu_decodes(folder):
    """Here on the CPU: two batches, the second one smaller."""
    files = [read_file(str(p)) for p in sorted(folder.rglob('*.jpeg'))]
    batches = [dict(inputs=files[:3]), dict(inputs=files[3:])]
    given = list(decoders.ByTorchvision(batches, 'cpu'))
    shapes = [tuple(batch['inputs'].shape) for batch in given]
    assert shapes == [(3, 3, 224, 224), (1, 3, 224, 224)]
    assert given[0]['inputs'].dtype == torch.uint8
    assert not torch.equal(given[0]['inputs'][0], given[0]['inputs'][1])


def test_dali(folder):
    pytest.importorskip('nvidia.dali')
    batches = decoders.Dali(folder / 'train', 2, 1, 6, 'cpu')
    for _ in range(2):  # again, as in each turn
        given = list(batches)
        assert [tuple(b['inputs'].shape) for b in given] == (
            [(2, 3, 224, 224)] * 3
        )
        assert 90 < given[0]['inputs'].float().mean() < 160


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'turbojpeg', None)
    with pytest.raises(UsageError) as error:
        decoders.check('turbojpeg')
    line = 'the decoder turbojpeg needs the package PyTurboJPEG: pip install '
    assert str(error.value).startswith(f'{line}PyTurboJPEG (')


def test_a_library_that_is_not_installed(monkeypatch):
    def fail(backend):
        raise RuntimeError('Unable to locate it.\nSecond line')

    monkeypatch.setitem(decoders.PACKAGES, 'turbojpeg', ('torch', 'torch'))
    monkeypatch.setattr(mmcv, 'use_backend', fail)
    with pytest.raises(UsageError, match='libturbojpeg0.*locate it') as error:
        decoders.check('turbojpeg')
    assert '\n' not in str(error.value)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UsageError, match='torchvision-gpu needs a GPU; none'):
        decoders.check('torchvision-gpu')


def test_each_decoder_is_known():
    others = {'dali-cpu', 'torchvision-gpu', 'dali'}
    assert set(recipes.DECODERS) == set(decoders.LOADS) | others
    assert isinstance(decoders.LOADS['opencv'], dict)


def test_a_loader_of_bytes(folder):
    """What a GPU gets: the files of a batch, not stacked."""
    init_default_scope('mmpretrain')
    read = TRANSFORMS.build(dict(type='ReadFile'))
    path = next(folder.rglob('*.jpeg'))
    assert read(dict(img_path=str(path)))['inputs'].numpy().tobytes() == (
        path.read_bytes()
    )
