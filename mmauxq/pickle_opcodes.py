"""Follows the opcodes of a pickle, without building what they name.

A pickle is a program. ``torch.load(..., weights_only=True)`` runs it with few
functions, but believes its numbers: storages and shapes of terabytes, views
beyond the end of their storage, nests that take hours to walk. Here nothing
is called: names become placeholders, and the calls by which torch describes
tensors become checked descriptions.
"""

import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

from mmauxq.errors import shorten

LEAST, MOST = 300_000, 4_000_000
"""Opcodes that a file of any size may have, and that none may exceed. A tensor
takes some 44, and 300 bytes of a file; beyond the first number there is one
opcode for four bytes."""
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
    r'(numpy|mm(engine|cv|cls|pretrain|det|seg|razor|auxq)|collections'
    r'|_?_?codecs|argparse|datetime|pathlib)\..*'
    r'|torch\.(_utils\._rebuild_\w+|_tensor\._rebuild_\w+|device'
    r'|(nn\.parameter\.|storage\.)?[A-Z]\w+)'
    r'|(builtins|__builtin__)\.'
    r'(bytes|complex|frozenset|getattr|object|range|set|slice)'
)
"""Names that honest checkpoints hold, and that nobody here needs. A file with
another name is refused."""


class BadFile(Exception):
    """The message completes "it holds ..."."""


@dataclass(eq=False)
class Other:
    """What stands for an object of another kind, or names it."""

    name: str = ''


@dataclass
class Storage:
    key: str
    dtype: torch.dtype
    count: int


@dataclass(eq=False)
class View:
    """A tensor in a storage; numbers are counted in elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class Ordered:
    """An OrderedDict with the versions of modules in a state dict."""

    items: dict = field(default_factory=dict)
    state: Any = None


MARK = Other('mark')


def follow(file: BinaryIO, size: int, storages: dict[str, Storage]) -> Any:
    """The value that a pickle describes. Nothing of it is called.

    Args:
        file: Is left behind the pickle.
        size: Of the whole file, in bytes.
        storages: Filled with those that it refers to.
    """
    limit = min(max(LEAST, size // 4), MOST)
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
        if count > limit:
            raise BadFile(f'more than {limit} objects')
        name = opcode.name
        if name in _CONSTANTS:
            if isinstance(argument, int) and argument.bit_length() > 128:
                raise BadFile('an integer of more than 128 bits')
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
            stack[-3:] = [Other()]
        elif name == 'BUILD':
            state = stack.pop()
            if isinstance(stack[-1], Ordered):
                stack[-1].state = state
        elif name == 'BINPERSID':
            stack[-1] = _storage(stack[-1])
            storages[stack[-1].key] = stack[-1]
        elif name == 'STOP':
            break
        elif name not in ('PROTO', 'FRAME'):
            raise BadFile(f'the opcode {name}')
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
    elif not isinstance(target, Other):
        raise ValueError('not a list')


def _set_items(target: Any, items: list[Any]) -> None:
    if isinstance(target, Ordered):
        target = target.items
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is str or (
                type(key) is int and 0 <= key <= LARGEST_KEY
            ):
                target[key] = value
    elif not isinstance(target, Other):
        raise ValueError('not a dict')


def _named(name: str) -> Other:
    dtype = getattr(torch, name.removeprefix('torch.'), None)
    if not LEFT_OUT.fullmatch(name) and not isinstance(dtype, torch.dtype):
        raise BadFile(shorten(name)[1:-1])
    return Other(name)


def _result(function: Any, arguments: Any) -> Any:
    """What stands for the result of a call."""
    name = function.name if isinstance(function, Other) else ''
    if not isinstance(arguments, tuple):
        raise ValueError('arguments that are no tuple')
    if name == 'collections.OrderedDict' and not arguments:
        return Ordered()
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
        if not isinstance(storage, Storage):
            return Other()
        if builder == 'tensor_v3':  # bytes, and the type beside them
            dtype = getattr(torch, arguments[6].name.removeprefix('torch.'))
            count, more = divmod(storage.count, dtype.itemsize)
            if more:
                raise BadFile('a storage of half an element')
            storage = Storage(storage.key, dtype, count)
        return _view(storage, offset, size, stride)
    return Other()


def _storage(pid: Any) -> Storage:
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != 'storage':
        raise BadFile('a reference to something outside of it')
    _, kind, key, _, count, *_ = pid
    name = kind.name if isinstance(kind, Other) else ''
    kind = name.rpartition('.')[2].removesuffix('Storage')
    if kind not in STORAGES or not isinstance(key, str):
        raise BadFile('a storage of unknown type')
    if type(count) is not int or count < 0:
        raise BadFile(f'a storage of {shorten(count)} elements')
    return Storage(key, STORAGES[kind], count)


def _view(storage: Storage, offset: Any, size: Any, stride: Any) -> View:
    """A tensor that lies inside of its storage."""
    if not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise BadFile('a tensor whose shape is no tuple')
    numbers = [offset, *size, *stride]
    if any(type(number) is not int for number in numbers):
        raise BadFile('a tensor whose shape is not made of integers')
    if min(numbers) < 0:
        raise BadFile(f'a tensor with a negative number in {numbers[:9]}')
    if max(numbers) >= 2**63:
        raise BadFile('a tensor with a number beyond 64 bits')
    if len(size) != len(stride) or len(size) > 64:
        raise BadFile('a tensor with more strides than axes, or fewer')
    count = math.prod(size)
    if count:
        steps = zip(size, stride, strict=True)
        last = offset + sum((n - 1) * step for n, step in steps)
        if last >= storage.count or count > max(storage.count, SMALL):
            raise BadFile(
                f'a tensor of shape {size[:9]} in a storage of '
                f'{storage.count} elements'
            )
    else:  # nothing of it is ever read
        offset, stride = 0, (1,) * len(size)
    return View(storage, offset, size, stride)
