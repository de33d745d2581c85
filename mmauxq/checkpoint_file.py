"""What a checkpoint file claims, checked before any of it is believed.

``torch.load(..., weights_only=True)`` runs no code, but it trusts numbers: a
file of a few bytes may claim storages and shapes of terabytes, views beyond
the end of their storage, or be packed so that it unfolds to any size. Here
the file is read without building anything of it.
"""

import io
import math
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = 0x1950A86A20F9469CFC6C
"""First object of a file in torch's format from before 1.6."""
SIZES = {
    'Untyped': 1, 'Byte': 1, 'Char': 1, 'Bool': 1, 'Half': 2, 'BFloat16': 2,
    'Short': 2, 'Int': 4, 'Float': 4, 'Long': 8, 'Double': 8,
    'ComplexFloat': 8, 'ComplexDouble': 16,
}  # fmt: skip
"""Bytes of an element of torch.NAMEStorage."""
SMALL = 2**20
"""A tensor with so many elements may repeat those of its storage."""
TENSORS = {
    '_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_tensor_v3',
}  # fmt: skip
PARAMETERS = {'_rebuild_parameter', '_rebuild_parameter_with_state'}


class BadFile(Exception):
    """A file that is refused; the message completes "it holds ...".

    Args:
        reason: ``None`` if it is just damaged.
    """

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(reason or 'damaged')
        self.reason = reason


def inspect(path: Path) -> None:
    """See that what a checkpoint file claims fits what it is.

    Raises:
        BadFile: If not.
        OSError: If it cannot be read.
    """
    with open(path, 'rb') as file:
        start = file.read(4)
        file.seek(0)
        try:
            if start == b'PK\x03\x04':
                _inspect_zip(path)
            else:
                _inspect_legacy(file, path.stat().st_size)
        except (BadFile, OSError):
            raise
        except Exception as error:  # damaged in any way
            raise BadFile() from error


def _inspect_zip(path: Path) -> None:
    import torch

    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise BadFile('two entries of one name')
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise BadFile('compressed entries, which may unfold to any size')
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise BadFile('entries that overlap')
    for name in names:
        if '\\' in name or name.startswith('/') or '..' in name.split('/'):
            raise BadFile(f'an entry with the path {name[:80]!r}')
    top = names[0].partition('/')[0] + '/' if names else ''
    if not all(name.startswith(top) for name in names):
        raise BadFile('entries outside of its folder')
    # torch reads the archive with another library: both must see the same
    reader = torch._C.PyTorchFileReader(str(path))
    theirs = {
        name: reader.get_record_header_offset(name)
        for name in reader.get_all_records()
    }
    ours = {e.filename[len(top) :]: e.header_offset for e in entries}
    if theirs != ours:
        raise BadFile('an archive in an archive, or a table that lies')
    if 'constants.pkl' in ours or 'code' in {n.split('/')[0] for n in ours}:
        raise BadFile('a TorchScript program')
    sizes = {
        e.filename[len(top) :].removeprefix('data/'): e.file_size
        for e in entries
        if e.filename.startswith(f'{top}data/')
    }
    claims = _Claims(io.BytesIO(reader.get_record('data.pkl')))
    claims.load()
    for key, count in claims.storages.items():
        if sizes.get(key) != count:
            raise BadFile(
                f'a storage that claims {count} bytes and has '
                f'{sizes.get(key, 0)}'
            )


def _inspect_legacy(file: BinaryIO, size: int) -> None:
    try:
        first = _Claims(file).load()
    except BadFile as error:  # it was no checkpoint in the first place
        raise BadFile() from error
    if first != MAGIC:
        raise BadFile()
    _Claims(file).load()  # protocol
    _Claims(file).load()  # byte order and the like
    claims = _Claims(file)
    claims.load()
    total = sum(claims.storages.values())
    if total > size - file.tell():
        raise BadFile()  # cut, or a claim


class _Thing:
    """What stands for everything that is not built."""

    def __init__(self, name: str = '') -> None:
        self.name = name

    def __call__(self, *args: Any) -> Any:
        return _Thing()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class _Storage(_Thing):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count


class _Builder(_Thing):
    """``torch._utils._rebuild_*``."""

    def __call__(self, *args: Any) -> Any:
        if self.name in PARAMETERS:
            return _Thing()
        storage, offset, size, *rest = args
        check_view(storage, offset, size, rest[0] if rest else ())
        return _Thing()


class _Size(_Thing):
    def __call__(self, size: Iterable[int] = ()) -> Any:
        return tuple(size)


def check_view(storage: Any, offset: Any, size: Any, stride: Any) -> None:
    """See that a tensor lies inside of its storage.

    Raises:
        BadFile: If a number is negative, no integer or too large.
    """
    if not isinstance(storage, _Storage):
        raise BadFile('a tensor without a storage')
    numbers = [offset, *_tuple(size), *_tuple(stride)]
    if any(type(number) is not int for number in numbers):
        raise BadFile('a tensor whose shape is not made of integers')
    if min(numbers) < 0:
        raise BadFile(f'a tensor with a negative number in {numbers[:9]}')
    if len(size) != len(stride) or len(size) > 64:
        raise BadFile('a tensor with more strides than axes, or fewer')
    count = math.prod(size)
    if not count:
        return
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if last >= storage.count or count > max(storage.count, SMALL):
        raise BadFile(
            f'a tensor of shape {tuple(size)[:9]} in a storage of '
            f'{storage.count} elements'
        )


def _tuple(value: Any) -> tuple:
    if not isinstance(value, tuple):
        raise BadFile('a tensor whose shape is no tuple')
    return value


class _Claims(pickle._Unpickler):  # type: ignore[name-defined]
    """Reads a pickle without building any of its objects.

    The one in Python: that in C reserves what a crafted memo index asks for.

    Attributes:
        storages: Key -> bytes that the storage of this key claims.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> _Thing:
        if module == 'torch._utils' and name.startswith('_rebuild'):
            if name not in TENSORS | PARAMETERS:
                raise BadFile(f'{module}.{name}')
            return _Builder(name)
        if (module, name) == ('torch', 'Size'):
            return _Size()
        if name == 'bytearray':  # of any length
            raise BadFile(f'{module}.{name}')
        if module in ('torch', 'torch.storage'):
            return _Thing(name)
        return _Thing()

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != 'storage':
            raise BadFile('a reference to something outside of it')
        _, kind, key, _, count, *_ = pid
        name = kind.name if isinstance(kind, _Thing) else ''
        size = SIZES.get(name.removesuffix('Storage'))
        if size is None or not isinstance(key, str):
            raise BadFile('a storage of unknown type')
        if type(count) is not int or count < 0:
            raise BadFile(f'a storage of {count!r} elements')
        if self.storages.setdefault(key, count * size) != count * size:
            raise BadFile('a storage with two sizes')
        return _Storage(count)

    def get_extension(self, code: int) -> None:
        raise BadFile('an extension code')

    def _load_object(self, arguments: int) -> None:
        del self.stack[-1 - arguments :]
        self.append(_Thing())

    dispatch = {
        **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]
        pickle.NEWOBJ[0]: lambda self: self._load_object(1),
        pickle.NEWOBJ_EX[0]: lambda self: self._load_object(2),
    }
