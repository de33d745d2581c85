import cv2
import numpy as np
import pytest

from mmauxq.datasets import InMemoryImages, TinyImageNet
from mmauxq.errors import UsageError

IDS = 'n01443537', 'n01629819'


@pytest.fixture
def root(tmp_path):
    """Two images of each class to train, and one to test."""
    image = np.zeros((64, 64, 3), np.uint8)
    rows = []
    for value, each in enumerate(IDS):
        folder = tmp_path / 'train' / each / 'images'
        folder.mkdir(parents=True)
        (folder.parent / f'{each}_boxes.txt').write_text('not an image')
        for i in range(2):
            file = folder / f'{each}_{i}.JPEG'
            cv2.imwrite(str(file), image + 100 * value)
        test = tmp_path / 'val' / 'images' / f'val_{value}.JPEG'
        test.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(test), image + 100 * value)
        rows.append(f'{test.name}\t{each}\t0\t32\t44\t62\n')
    # in the order of the archive's file, not of the classes
    file = tmp_path / 'val' / 'val_annotations.txt'
    file.write_text(''.join(reversed(rows)))
    (tmp_path / 'words.txt').write_text(
        f'n00000000\tentity\n{IDS[0]}\tgoldfish, Carassius auratus\n{IDS[1]}\n'
    )
    return tmp_path


def test_the_archive_as_it_is(root):
    train, val = TinyImageNet(str(root)), TinyImageNet(str(root), 'val')
    classes = ('goldfish, Carassius auratus', IDS[1])
    assert train.metainfo['classes'] == val.metainfo['classes'] == classes
    assert [i['gt_label'] for i in train.load_data_list()] == [0, 0, 1, 1]
    found = [
        (i['img_path'][-10:], i['gt_label']) for i in val.load_data_list()
    ]
    assert found == [('val_1.JPEG', 1), ('val_0.JPEG', 0)]
    (root / 'words.txt').unlink()
    assert TinyImageNet(str(root)).metainfo['classes'] == IDS


def test_held_in_memory(root):
    source = dict(type='mmauxq.TinyImageNet', data_root=str(root))
    held = InMemoryImages(source)
    assert held.images.shape == (4, 3, 64, 64)
    assert [int(x.float().mean()) // 50 for x in held.images] == [0, 0, 2, 2]


def test_bad_folders_are_one_line(root, tmp_path):
    with pytest.raises(UsageError, match="split: expected .*, got 'test'"):
        TinyImageNet(str(root), 'test')
    with pytest.raises(UsageError, match="folder with train, got 'nowhere'"):
        TinyImageNet('nowhere')
    file = root / 'val' / 'val_annotations.txt'
    for line, got in ('val_0.JPEG\tn99\t0\t0\t0\t0', 'n99'), ('v.JPEG', ''):
        file.write_text(f'{line}\n')
        with pytest.raises(UsageError, match=f"of train, got '{got}' for "):
            TinyImageNet(str(root), 'val')
    file.write_text('\n')
    with pytest.raises(UsageError, match=f'{file.name} .*, got none'):
        TinyImageNet(str(root), 'val')
    file.unlink()
    with pytest.raises(UsageError, match=f'{file.name} .*, got no file'):
        TinyImageNet(str(root), 'val')
    for image in (root / 'train' / IDS[0] / 'images').iterdir():
        image.unlink()
    with pytest.raises(UsageError, match=f'images in .*{IDS[0]}.*, got none'):
        TinyImageNet(str(root))
    empty = tmp_path / 'empty' / 'train'
    empty.mkdir(parents=True)
    (empty / '.DS_Store').touch()
    with pytest.raises(UsageError, match='folder for each class .*, got none'):
        TinyImageNet(str(empty.parent))
