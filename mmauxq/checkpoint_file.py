"""Reads checkpoint files of any origin, without building what they name.

A pickle is a program. ``torch.load(..., weights_only=True)`` runs it with few
functions, but believes its numbers: storages and shapes of terabytes, views
beyond the end of their storage, nests that take hours to walk. Here nothing
of the file is called. Its opcodes are followed by the rules below, and what
comes out are tensors, numbers, text, lists, tuples and dicts; objects of
NumPy, MMEngine and the like are left out. What the values mean is checked by
those who use them.
"""

import io
import math
import os
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlparse

import torch
from torch import Tensor

from mmauxq.errors import UsageError, shorten

MAGIC = 0x1950A86A20F9469CFC6C
"""First object of a file in torch's format from before 1.6."""
OBJECTS = 1_000_000
"""Opcodes, and values in the result. A network of a thousand layers with its
optimizer has a tenth of it."""
DEPTH = 32
SMALL = 2**20
"""A tensor with so many elements may repeat those of its storage."""
LARGEST_KEY = 2**24
"""Integer keys up to it can not be chosen to collide in a dict."""
STORAGES = {
    'Byte': torch.uint8, 'Char': torch.int8, 'Bool': torch.bool,
    'Half': torch.float16, 'BFloat16': torch.bfloat16, 'Short': torch.int16,
    'Int': torch.int32, 'Float': torch.float32, 'Long': torch.int64,
    'Double': torch.float64, 'ComplexFloat': torch.complex64,
    'ComplexDouble': torch.complex128, 'Untyped': torch.uint8,
}  # fmt: skip
LEFT_OUT = re.compile(
    r'(numpy|mm\w+|collections|_?_?codecs|argparse|datetime|pathlib)\..*'
    r'|torch\.(_utils\._rebuild_\w+|_tensor\._rebuild_\w+|device'
    r'|(nn\.parameter\.|storage\.)?[A-Z]\w+)'
    r'|(builtins|__builtin__)\.(getattr|set|frozenset|slice|complex|range|bytes|'
    r'object)'
)
"""Names that honest checkpoints hold, and that nobody here needs. A file with
another name is refused."""


class _BadFile(Exception):
    """The message completes "it holds ..."."""


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
    except _BadFile as error:
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
                value = _follow(io.BytesIO(records('data.pkl')), {})
                return _Result(lambda key: records(f'data/{key}'), size)(value)
        return _read_old(file, size)


def _read_old(file: BinaryIO, size: int) -> Any:
    """Torch's format from before 1.6."""
    storages: dict[str, _Storage] = {}
    try:
        first = _follow(file, {})
    except _BadFile:  # it was no checkpoint in the first place
        first = None
    if first != MAGIC:
        raise ValueError('not in a format of torch')
    _follow(file, {})  # version
    _follow(file, {})  # byte order
    value = _follow(file, storages)
    content: dict[str, bytes] = {}
    for key in _follow(file, {}):
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
        raise _BadFile('two entries of one name')
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _BadFile('compressed entries, which may unfold to any size')
    if sum(max(e.file_size, e.compress_size) for e in entries) > size:
        raise _BadFile('entries that overlap')
    for name in names:
        if '\\' in name or name.startswith('/') or '..' in name.split('/'):
            raise _BadFile(f'an entry with the path {shorten(name)}')
    top = names[0].partition('/')[0] + '/' if names else ''
    if not all(name.startswith(top) for name in names):
        raise _BadFile('entries outside of its folder')
    if f'{top}constants.pkl' in names:
        raise _BadFile('a TorchScript program')
    order = f'{top}byteorder'
    if order in names and archive.read(order) != b'little':
        raise _BadFile('numbers in another byte order')
    return lambda name: archive.read(top + name)


@dataclass(eq=False)
class _Other:
    """What stands for an object of another kind, or names it."""

    name: str = ''


@dataclass
class _Storage:
    key: str
    dtype: torch.dtype
    count: int


@dataclass(eq=False)
class _View:
    """A tensor in a storage; numbers are counted in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class _Ordered:
    """An OrderedDict with the versions of modules in a state dict."""

    items: dict = field(default_factory=dict)
    state: Any = None


MARK = _Other('mark')


def _follow(file: BinaryIO, storages: dict[str, _Storage]) -> Any:
    """The value that a pickle describes. Nothing of it is called.

    Args:
        file: Is left behind the pickle.
        storages: Filled with those that it refers to.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    count = 0

    def since_mark() -> list[Any]:
        start = len(stack) - 1
        while stack[start] is not MARK:
            start -= 1
            if start < 0:
                raise ValueError('no mark')
        items = stack[start + 1 :]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(file):
        count += 1
        if count > OBJECTS:
            raise _BadFile(f'more than {OBJECTS} objects')
        name = opcode.name
        if name in _CONSTANTS:
            if isinstance(argument, int) and argument.bit_length() > 128:
                raise _BadFile('an integer of more than 128 bits')
            stack.append(argument)
        elif name in _FIXED:
            stack.append(_FIXED[name]())
        elif name == 'MARK':
            stack.append(MARK)
        elif name == 'POP':
            stack.pop()
        elif name == 'POP_MARK':
            since_mark()
        elif name in ('BINGET', 'LONG_BINGET', 'GET'):
            stack.append(memo[argument])
        elif name in ('BINPUT', 'LONG_BINPUT', 'PUT'):
            memo[argument] = stack[-1]
        elif name == 'MEMOIZE':
            memo[len(memo)] = stack[-1]
        elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            length = int(name[-1])
            stack[-length:] = [tuple(stack[-length:])]
        elif name in ('TUPLE', 'LIST', 'FROZENSET'):
            items = since_mark()
            stack.append(tuple(items) if name == 'TUPLE' else items)
        elif name == 'DICT':
            items = since_mark()
            stack.append({})
            _set_items(stack[-1], items)
        elif name in ('APPENDS', 'ADDITEMS'):
            items = since_mark()
            _extend(stack[-1], items)
        elif name == 'APPEND':
            items = [stack.pop()]
            _extend(stack[-1], items)
        elif name == 'SETITEMS':
            items = since_mark()
            _set_items(stack[-1], items)
        elif name == 'SETITEM':
            items = stack[-2:]
            del stack[-2:]
            _set_items(stack[-1], items)
        elif name == 'GLOBAL':
            stack.append(_named(argument.replace(' ', '.')))
        elif name == 'STACK_GLOBAL':
            stack[-2:] = [_named(f'{stack[-2]}.{stack[-1]}')]
        elif name in ('REDUCE', 'NEWOBJ'):
            stack[-2:] = [_result(stack[-2], stack[-1])]
        elif name == 'NEWOBJ_EX':
            stack[-3:] = [_Other()]
        elif name == 'BUILD':
            state = stack.pop()
            if isinstance(stack[-1], _Ordered):
                stack[-1].state = state
        elif name == 'BINPERSID':
            stack[-1] = _storage(stack[-1])
            storages[stack[-1].key] = stack[-1]
        elif name == 'STOP':
            break
        elif name not in ('PROTO', 'FRAME'):
            raise _BadFile(f'the opcode {name}')
    (value,) = stack
    return value


_CONSTANTS = {
    'BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4', 'INT', 'BINFLOAT',
    'FLOAT', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8', 'UNICODE',
    'BINSTRING', 'SHORT_BINSTRING', 'STRING', 'BINBYTES', 'SHORT_BINBYTES',
    'BINBYTES8',
}  # fmt: skip
_FIXED: dict[str, Callable[[], Any]] = {
    'NONE': lambda: None, 'NEWTRUE': lambda: True, 'NEWFALSE': lambda: False,
    'EMPTY_LIST': list, 'EMPTY_SET': list, 'EMPTY_DICT': dict,
    'EMPTY_TUPLE': tuple,
}  # fmt: skip


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, _Other):
        raise ValueError('not a list')


def _set_items(target: Any, items: list[Any]) -> None:
    if isinstance(target, _Ordered):
        target = target.items
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is str or (
                type(key) is int and 0 <= key <= LARGEST_KEY
            ):
                target[key] = value
    elif not isinstance(target, _Other):
        raise ValueError('not a dict')


def _named(name: str) -> _Other:
    dtype = getattr(torch, name.removeprefix('torch.'), None)
    if not LEFT_OUT.fullmatch(name) and not isinstance(dtype, torch.dtype):
        raise _BadFile(shorten(name)[1:-1])
    return _Other(name)


def _result(function: Any, arguments: Any) -> Any:
    """What stands for the result of a call."""
    name = function.name if isinstance(function, _Other) else ''
    if not isinstance(arguments, tuple):
        raise ValueError('arguments that are no tuple')
    if name == 'collections.OrderedDict' and not arguments:
        return _Ordered()
    if name == 'collections.Counter' and isinstance(arguments[0], dict):
        return arguments[0]
    if name == 'torch.Size':
        return tuple(*arguments)
    if name in ('builtins.set', '__builtin__.set'):
        return list(*arguments)
    _, _, builder = name.rpartition('torch._utils._rebuild_')
    if builder in ('parameter', 'parameter_with_state'):
        return arguments[0]
    if builder in ('tensor', 'tensor_v2', 'tensor_v3'):
        storage, offset, size, *rest = arguments
        stride = rest[0] if rest else ()
        if not isinstance(storage, _Storage):
            return _Other()
        if builder == 'tensor_v3':  # bytes, and the type beside them
            dtype = getattr(torch, arguments[6].name.removeprefix('torch.'))
            count, more = divmod(storage.count, dtype.itemsize)
            if more:
                raise _BadFile('a storage of half an element')
            storage = _Storage(storage.key, dtype, count)
        return _view(storage, offset, size, stride)
    return _Other()


def _storage(pid: Any) -> _Storage:
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != 'storage':
        raise _BadFile('a reference to something outside of it')
    _, kind, key, _, count, *_ = pid
    name = kind.name if isinstance(kind, _Other) else ''
    kind = name.rpartition('.')[2].removesuffix('Storage')
    if kind not in STORAGES or not isinstance(key, str):
        raise _BadFile('a storage of unknown type')
    if type(count) is not int or count < 0:
        raise _BadFile(f'a storage of {shorten(count)} elements')
    return _Storage(key, STORAGES[kind], count)


def _view(storage: _Storage, offset: Any, size: Any, stride: Any) -> _View:
    """A tensor that lies inside of its storage."""
    if not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise _BadFile('a tensor whose shape is no tuple')
    numbers = [offset, *size, *stride]
    if any(type(number) is not int for number in numbers):
        raise _BadFile('a tensor whose shape is not made of integers')
    if min(numbers) < 0:
        raise _BadFile(f'a tensor with a negative number in {numbers[:9]}')
    if max(numbers) >= 2**63:
        raise _BadFile('a tensor with a number beyond 64 bits')
    if len(size) != len(stride) or len(size) > 64:
        raise _BadFile('a tensor with more strides than axes, or fewer')
    count = math.prod(size)
    if count:
        steps = zip(size, stride, strict=True)
        last = offset + sum((n - 1) * step for n, step in steps)
        if last >= storage.count or count > max(storage.count, SMALL):
            raise _BadFile(
                f'a tensor of shape {size[:9]} in a storage of '
                f'{storage.count} elements'
            )
    else:  # nothing of it is ever read
        offset, stride = 0, (1,) * len(size)
    return _View(storage, offset, size, stride)


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
        if self.values > OBJECTS or depth > DEPTH:
            raise _BadFile(
                f'a nest of more than {OBJECTS} values or {DEPTH} levels'
            )
        if isinstance(value, dict):
            return {
                k: self(v, depth + 1)
                for k, v in value.items()
                if not isinstance(v, _Other)
            }
        if isinstance(value, (list, tuple)):
            return type(value)(self(v, depth + 1) for v in value)
        if isinstance(value, _Ordered):
            result = OrderedDict(self(value.items, depth + 1))
            state = self(value.state, depth + 1)
            versions = state.get('_metadata') if type(state) is dict else None
            if isinstance(versions, dict) and all(
                isinstance(v, dict) for v in versions.values()
            ):
                result._metadata = versions  # type: ignore[attr-defined]
            return result
        if isinstance(value, _View):
            if id(value) not in self.tensors:
                self.tensors[id(value)] = self._tensor(value)
            return self.tensors[id(value)]
        if isinstance(value, (_Other, _Storage)):
            return None
        return value

    def _tensor(self, view: _View) -> Tensor:
        storage = view.storage
        length = storage.count * storage.dtype.itemsize
        self.budget -= math.prod(view.size) * storage.dtype.itemsize
        if self.budget < 0:
            raise _BadFile('tensors that repeat the same numbers many times')
        if storage.key not in self.storages:
            self.storages[storage.key] = bytearray(self.record(storage.key))
        data = self.storages[storage.key]
        if len(data) != length:
            raise _BadFile(
                f'a storage that claims {length} bytes and has {len(data)}'
            )
        if not math.prod(view.size):
            return torch.empty(view.size, dtype=storage.dtype)
        if storage.dtype == torch.bool and max(data) > 1:
            raise _BadFile('a bool that is neither 0 nor 1')
        flat = torch.frombuffer(data, dtype=storage.dtype)
        return flat.as_strided(view.size, view.stride, view.offset)
