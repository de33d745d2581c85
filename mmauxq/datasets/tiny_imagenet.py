from pathlib import Path
from typing import Any

from mmpretrain.datasets import BaseDataset

from mmauxq.errors import UsageError, check_choice
from mmauxq.registry import DATASETS


@DATASETS.register_module()
class TinyImageNet(BaseDataset):
    """200 classes of ImageNet at 64 x 64 pixels: 500 images of each to train,
    50 to test.

    As it is unpacked from its archive: ``train/CLASS/images/*.JPEG``,
    ``val/images/*.JPEG`` with ``val/val_annotations.txt``, and the names of
    the classes in ``words.txt``. Its own test images have no labels.

    Args:
        data_root: The folder ``tiny-imagenet-200``.
        split: ``'train'`` or ``'val'``.
        pipeline: Transforms, as for any mmpretrain data set.

    Raises:
        UsageError: If there is no such folder, no class or no image of one,
            no ``val_annotations.txt``, or an image of ``val`` has a class that
            ``train`` does not have.
    """

    def __init__(
        self,
        data_root: str,
        split: str = 'train',
        pipeline: Any = (),
        **kwargs: Any,
    ) -> None:
        check_choice('TinyImageNet: split', split, ('train', 'val'))
        self.split, self.root = split, Path(data_root)
        train = self.root / 'train'
        if not train.is_dir():
            raise UsageError(
                'TinyImageNet: data_root: expected a folder with train, '
                f'got {data_root!r}'
            )
        self.ids = sorted(
            each.name for each in train.iterdir() if each.is_dir()
        )
        if not self.ids:
            raise UsageError(
                f'TinyImageNet: expected a folder for each class in {train}, '
                'got none'
            )
        super().__init__(
            ann_file='',
            metainfo=dict(classes=self._names()),
            pipeline=pipeline,
            test_mode=split == 'val',
            **kwargs,
        )

    def _names(self) -> tuple[str, ...]:
        """Of the classes, or their identifiers without ``words.txt``."""
        file, names = self.root / 'words.txt', {}
        if file.is_file():
            parts = (x.partition('\t') for x in file.read_text().splitlines())
            names = {each: name for each, _, name in parts if name}
        return tuple(names.get(each, each) for each in self.ids)

    def load_data_list(self) -> list[dict]:
        """One ``dict(img_path=..., gt_label=int)`` for each image."""
        labels = {each: label for label, each in enumerate(self.ids)}
        if self.split == 'train':
            pairs = [
                (path, each)
                for each in self.ids
                for path in self._images_of(each)
            ]
        else:
            folder = self.root / 'val'
            file = folder / 'val_annotations.txt'
            lines = file.read_text().splitlines() if file.is_file() else []
            if not any(lines):
                raise UsageError(
                    f'TinyImageNet: expected {file} with a line for each '
                    f'image, got {"none" if file.is_file() else "no file"}'
                )
            # a line of one column has the class '', which is refused below
            rows = [f'{line}\t'.split('\t') for line in lines if line]
            pairs = [(folder / 'images' / row[0], row[1]) for row in rows]
        for path, each in pairs:
            if each not in labels:
                raise UsageError(
                    f'TinyImageNet: expected a class of train, got {each!r} '
                    f'for {path}'
                )
        return [
            dict(img_path=str(path), gt_label=labels[each])
            for path, each in pairs
        ]

    def _images_of(self, each: str) -> list[Path]:
        folder = self.root / 'train' / each / 'images'
        found = sorted(folder.glob('*.JPEG'))
        if not found:
            raise UsageError(
                f'TinyImageNet: expected images in {folder}, got none'
            )
        return found
