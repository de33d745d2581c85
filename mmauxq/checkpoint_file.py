"""Reads checkpoint files of any origin, and calls nothing that they name.

What comes out are tensors, numbers, text, lists, tuples and dicts; objects of
NumPy, MMEngine and the like are left out. What the values mean is checked by
those who use them.
"""

import io
import math
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

import torch
from torch import Tensor

from mmauxq.errors import UsageError, shorten
from mmauxq.pickle_opcodes import (
    BadFile,
    Ordered,
    Other,
    Storage,
    View,
    follow,
)

MAGIC = 0x1950A86A20F9469CFC6C
"""First object of a file in torch's format from before 1.6."""
VALUES, DEPTH = 300_000, 32
"""What the result may hold. Twenty thousand tensors of a training checkpoint
come with sixty thousand other values."""


def read_checkpoint(path: str | os.PathLike) -> Any:
    """The content of a checkpoint file: plain values, and tensors on the CPU.

    Objects of other kinds are left out of dicts, and ``None`` in lists.

    Args:
        path: A local file in one of torch's two formats.

    Raises:
        UsageError: If the file is missing, may not be read, is damaged or
            truncated, or claims what cannot be true.
    """
    file = Path(path).expanduser()
    try:
        if not file.exists():
            raise UsageError(f'checkpoint {file} does not exist')
        if not file.is_file():  # a pipe would never end
            raise UsageError(f'checkpoint {file} is not a file')
        return _read(file)
    except UsageError:
        raise
    except BadFile as error:
        raise UsageError(
            f'checkpoint {file} is refused because it holds {error}; expected '
            'tensors, numbers and text'
        ) from error
    except PermissionError as error:
        raise UsageError(f'checkpoint {file} may not be read') from error
    except Exception as error:
        # a damaged file can fail in any way: zip directory, opcodes, sizes
        raise UsageError(
            f'checkpoint {file} is truncated or not a checkpoint '
            f'({type(error).__name__})'
        ) from error


def read_source(source: str, folder: str | None = None) -> Any:
    """As :func:`read_checkpoint`, also for an address.

    Args:
        source: A file, or an address that begins with http:// or https://.
        folder: Where the file of an address is kept; by default where torch
            keeps those that it downloads.

    Raises:
        UsageError: As :func:`read_checkpoint`.
    """
    scheme, found, _ = source.partition('://')
    if not found:
        return read_checkpoint(source)
    name = Path(urlparse(source).path).name
    if scheme not in ('http', 'https') or not name:
        raise UsageError(
            f'checkpoint {source}: expected a file or the http address of one'
        )
    kept = Path(folder or Path(torch.hub.get_dir(), 'checkpoints'), name)
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(source, str(kept))
    return read_checkpoint(kept)


def _read(path: Path) -> Any:
    size = path.stat().st_size
    with open(path, 'rb') as file:
        start = file.read(4)
        file.seek(0)
        if start == b'PK\x03\x04':
            with zipfile.ZipFile(file) as archive:
                records = _records(archive, size)
                value = follow(io.BytesIO(records('data.pkl')), size, {})
                return _Result(lambda key: records(f'data/{key}'), size)(value)
        return _read_old(file, size)


def _read_old(file: BinaryIO, size: int) -> Any:
    """Torch's format from before 1.6."""
    storages: dict[str, Storage] = {}
    try:
        first = follow(file, size, {})
    except BadFile:  # it was no checkpoint in the first place
        first = None
    if first != MAGIC:
        raise ValueError('not in a format of torch')
    follow(file, size, {})  # version
    follow(file, size, {})  # byte order
    value = follow(file, size, storages)
    content: dict[str, bytes] = {}
    for key in follow(file, size, {}):
        count = int.from_bytes(file.read(8), 'little', signed=True)
        length = count * storages[key].dtype.itemsize
        if not 0 <= length <= size - file.tell():
            raise EOFError
        content[key] = file.read(length)
    return _Result(content.__getitem__, size)(value)


def _records(archive: zipfile.ZipFile, size: int) -> Callable[[str], bytes]:
    """Reads an entry of torch's archive; all were checked."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise BadFile('two entries of one name')
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise BadFile('compressed entries, which may unfold to any size')
    if sum(max(e.file_size, e.compress_size) for e in entries) > size:
        raise BadFile('entries that overlap')
    for name in names:
        if '\\' in name or name.startswith('/') or '..' in name.split('/'):
            raise BadFile(f'an entry with the path {shorten(name)}')
    top = names[0].partition('/')[0] + '/' if names else ''
    if not all(name.startswith(top) for name in names):
        raise BadFile('entries outside of its folder')
    if f'{top}constants.pkl' in names:
        raise BadFile('a TorchScript program')
    order = f'{top}byteorder'
    if order in names and archive.read(order) != b'little':
        raise BadFile('numbers in another byte order')
    return lambda name: archive.read(top + name)


class _Result:
    """Turns what was read into plain values and tensors.

    Args:
        record: The bytes of a storage by its key.
        size: Of the file, in bytes.
    """

    def __init__(self, record: Callable[[str], bytes], size: int) -> None:
        self.record, self.budget = record, 2 * size + 2**26
        self.values = 0
        self.storages: dict[str, bytearray] = {}
        self.tensors: dict[int, Tensor] = {}

    def __call__(self, value: Any, depth: int = 0) -> Any:
        self.values += 1
        if self.values > VALUES or depth > DEPTH:
            raise BadFile(
                f'a nest of more than {VALUES} values or {DEPTH} levels'
            )
        if isinstance(value, dict):
            return {
                k: self(v, depth + 1)
                for k, v in value.items()
                if not isinstance(v, Other)
            }
        if isinstance(value, (list, tuple)):
            return type(value)(self(v, depth + 1) for v in value)
        if isinstance(value, Ordered):
            result = OrderedDict(self(value.items, depth + 1))
            state = self(value.state, depth + 1)
            versions = state.get('_metadata') if type(state) is dict else None
            if isinstance(versions, dict) and all(
                isinstance(v, dict) for v in versions.values()
            ):
                result._metadata = versions  # type: ignore[attr-defined]
            return result
        if isinstance(value, View):
            if id(value) not in self.tensors:
                self.tensors[id(value)] = self._tensor(value)
            return self.tensors[id(value)]
        if isinstance(value, (Other, Storage)):
            return None
        return value

    def _tensor(self, view: View) -> Tensor:
        storage = view.storage
        length = storage.count * storage.dtype.itemsize
        self.budget -= math.prod(view.size) * storage.dtype.itemsize
        if self.budget < 0:
            raise BadFile('tensors that repeat the same numbers many times')
        if storage.key not in self.storages:
            self.storages[storage.key] = bytearray(self.record(storage.key))
        data = self.storages[storage.key]
        if len(data) != length:
            raise BadFile(
                f'a storage that claims {length} bytes and has {len(data)}'
            )
        if not math.prod(view.size):
            return torch.empty(view.size, dtype=storage.dtype)
        if storage.dtype == torch.bool and max(data) > 1:
            raise BadFile('a bool that is neither 0 nor 1')
        flat = torch.frombuffer(data, dtype=storage.dtype)
        return flat.as_strided(view.size, view.stride, view.offset)
