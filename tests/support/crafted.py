"""Checkpoint files that nobody should load, built opcode by opcode.

``CRAFTED`` maps a name to a function that returns the bytes of a file. Each
would run code, read memory that is not its own, or take far more memory or
time than the file is long, if its claims were believed. Code that runs would
make a file ``ran`` in the current directory. Those in ``LEFT_OUT`` name what
honest files name, too: they are read without that part.
"""

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CRAFTED: dict[str, Callable[[], bytes]] = {}
LEFT_OUT: set[str] = set()
HUGE = 2**40


@dataclass
class Global:
    """``module.name``, looked up by the reader."""

    module: str
    name: str


@dataclass
class Call:
    """The result of a call."""

    function: Any
    arguments: tuple = ()


@dataclass
class Build:
    """An object with a state set."""

    thing: Any
    state: Any


@dataclass
class Reference:
    """A persistent id."""

    pid: Any


@dataclass
class Raw:
    """Opcodes that leave one object on the stack."""

    code: bytes


def opcodes(value: Any) -> bytes:
    """The opcodes that make ``value``, without a frame."""
    if isinstance(value, Raw):
        return value.code
    if isinstance(value, Global):
        return f'c{value.module}\n{value.name}\n'.encode()
    if isinstance(value, Call):
        return opcodes(value.function) + opcodes(value.arguments) + b'R'
    if isinstance(value, Build):
        return opcodes(value.thing) + opcodes(value.state) + b'b'
    if isinstance(value, Reference):
        return opcodes(value.pid) + b'Q'
    if isinstance(value, tuple):
        return b'(' + b''.join(map(opcodes, value)) + b't'
    if isinstance(value, list):
        return b']' + b''.join(opcodes(v) + b'a' for v in value)
    if isinstance(value, dict):
        items = (opcodes(k) + opcodes(v) + b's' for k, v in value.items())
        return b'}' + b''.join(items)
    return pickle.dumps(value, 2)[2:-1]  # without PROTO and STOP


def pickled(value: Any) -> bytes:
    """``value`` as a pickle."""
    return b'\x80\x02' + opcodes(value) + b'.'


def archive(
    value: Any,
    records: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
    folder: str = 'archive/',
) -> bytes:
    """A file as ``torch.save`` writes it.

    Args:
        value: What is in it.
        records: Name of further entries, such as ``'data/0'``, -> content.
        compression: Of all entries.
        folder: In which they lie.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', compression) as file:
        file.writestr(f'{folder}data.pkl', pickled(value))
        file.writestr(f'{folder}byteorder', 'little')
        file.writestr(f'{folder}version', '3\n')
        for name, content in (records or {}).items():
            file.writestr(folder + name, content)
    return out.getvalue()


def legacy(value: Any, storages: bytes = b'', keys: tuple = ()) -> bytes:
    """A file in torch's format from before 1.6."""
    head = (
        0x1950A86A20F9469CFC6C,
        1001,
        dict(protocol_version=1001, little_endian=True, type_sizes={}),
    )
    return b''.join(
        [
            *(pickle.dumps(part, 2) for part in head),
            pickled(value),
            pickle.dumps(list(keys), 2),
            storages,
        ]
    )


def storage(count: Any, key: Any = '0', kind: str = 'FloatStorage', *more):
    """A reference to a storage of ``count`` elements."""
    return Reference(
        ('storage', Global('torch', kind), key, 'cpu', count, *more)
    )


def tensor(size, stride, offset=0, count=4, storage_=None) -> Call:
    """A view of a storage."""
    return Call(
        Global('torch._utils', '_rebuild_tensor_v2'),
        (
            storage(count) if storage_ is None else storage_,
            offset,
            size,
            stride,
            False,
            Call(Global('collections', 'OrderedDict')),
        ),
    )


def checkpoint(value: Any, where: str = 'w') -> dict:
    """A training checkpoint with ``value`` in it."""
    hub = dict(log_scalars={}, runtime_info={}, resumed_keys={})
    content = dict(
        meta=dict(epoch=1, iter=1, seed=0),
        state_dict={},
        message_hub=hub,
        optimizer=dict(state={}, param_groups=[]),
    )
    if where == 'w':
        content['state_dict'] = {'w': value}
    else:
        content[where] = value
    return content


FOUR = {'data/0': struct.pack('<4f', 1, 2, 3, 4)}


def crafted(function: Callable[[], bytes]) -> Callable[[], bytes]:
    """Put a builder on the list."""
    CRAFTED[function.__name__.replace('_', ' ')] = function
    return function


def left_out(function: Callable[[], bytes]) -> Callable[[], bytes]:
    """Put a builder of a file that is read in part on the list."""
    LEFT_OUT.add(function.__name__.replace('_', ' '))
    return crafted(function)


def _touch() -> tuple:
    return ('touch ran',)


# --- code ------------------------------------------------------------------


@crafted
def reduce_of_system() -> bytes:
    return archive(checkpoint(Call(Global('posix', 'system'), _touch())))


@crafted
def reduce_of_system_in_the_old_format() -> bytes:
    return legacy(checkpoint(Call(Global('os', 'system'), _touch())))


@crafted
def reduce_of_system_in_the_message_hub() -> bytes:
    call = Call(Global('subprocess', 'getoutput'), _touch())
    return archive(checkpoint(call, 'message_hub'))


@crafted
def eval_of_text() -> bytes:
    text = '__import__("os").system("touch ran")'
    return archive(checkpoint(Call(Global('builtins', 'eval'), (text,))))


@left_out
def getattr_chain() -> bytes:
    get = Global('builtins', 'getattr')
    buffer = Global('mmengine.logging.history_buffer', 'HistoryBuffer')
    scope = Call(get, (Call(get, (buffer, 'mean')), '__globals__'))
    module = Call(Call(get, (scope, 'get')), ('np',))
    return archive(checkpoint(Call(get, (module, 'os'))))


@crafted
def getattr_of_a_module() -> bytes:
    get = Global('builtins', 'getattr')
    module = Call(Global('builtins', '__import__'), ('os',))
    return archive(checkpoint(Call(Call(get, (module, 'system')), _touch())))


@crafted
def build_of_a_class() -> bytes:
    buffer = Global('mmengine.logging.history_buffer', 'HistoryBuffer')
    return archive(checkpoint(Build(buffer, {'mean': Global('os', 'system')})))


@crafted
def old_instance_opcode() -> bytes:
    return archive(checkpoint(Raw(b'(Vtouch ran\nios\nsystem\n')))


@crafted
def extension_code() -> bytes:
    return archive(checkpoint(Raw(b'\x82\x01')))


@crafted
def partial_of_system() -> bytes:
    part = Call(
        Global('functools', 'partial'), (Global('os', 'system'), 'touch ran')
    )
    return archive(checkpoint(Call(part)))


@crafted
def load_in_load() -> bytes:
    inner = pickled(Call(Global('os', 'system'), _touch()))
    return archive(checkpoint(Call(Global('pickle', 'loads'), (inner,))))


@crafted
def torch_load_in_load() -> bytes:
    stream = Call(
        Global('_io', 'BytesIO'), (reduce_of_system_in_the_old_format(),)
    )
    return archive(checkpoint(Call(Global('torch', 'load'), (stream,))))


@crafted
def storage_that_loads() -> bytes:
    load = Global('torch.storage', '_load_from_bytes')
    inner = reduce_of_system_in_the_old_format()
    return archive(checkpoint(Call(load, (inner,))))


@crafted
def numpy_array_of_objects() -> bytes:
    kind = Build(
        Call(Global('numpy', 'dtype'), ('O8', False, True)),
        (3, '|', None, None, None, -1, -1, 63),
    )
    empty = Call(
        Global('numpy.core.multiarray', '_reconstruct'),
        (Global('numpy', 'ndarray'), (0,), b'b'),
    )
    state = (1, (1,), kind, False, [Call(Global('os', 'system'), _touch())])
    return archive(checkpoint(Build(empty, state), 'meta'))


@left_out
def numpy_dtype_with_pointers() -> bytes:
    inner = Call(Global('numpy', 'dtype'), ('O8', False, True))
    state = (3, '|', None, ('a',), {'a': (inner, 0)}, 8, 8, 63)
    kind = Build(Call(Global('numpy', 'dtype'), ('f8', False, True)), state)
    scalar = Global('numpy.core.multiarray', 'scalar')
    return archive(checkpoint(Call(scalar, (kind, b'A' * 8)), 'meta'))


@left_out
def numpy_array_of_huge_shape() -> bytes:
    kind = Build(
        Call(Global('numpy', 'dtype'), ('f8', False, True)),
        (3, '<', None, None, None, -1, -1, 0),
    )
    empty = Call(
        Global('numpy.core.multiarray', '_reconstruct'),
        (Global('numpy', 'ndarray'), (HUGE,), b'b'),
    )
    return archive(
        checkpoint(Build(empty, (1, (HUGE,), kind, False, b'')), 'meta')
    )


@left_out
def memory_map() -> bytes:
    call = Call(Global('numpy', 'memmap'), ('/etc/passwd',))
    return archive(checkpoint(call, 'meta'))


@crafted
def torchscript_program() -> bytes:
    more = {
        'constants.pkl': pickled(()),
        'code/__torch__.py': b'class M(Module):\n  pass\n',
    }
    return archive(checkpoint(1, 'meta'), more)


# --- memory ----------------------------------------------------------------


@crafted
def storage_beyond_its_entry() -> bytes:
    return archive(checkpoint(tensor((4096,), (1,), count=4096)), FOUR)


@crafted
def storage_of_terabytes() -> bytes:
    return archive(checkpoint(tensor((HUGE,), (1,), count=HUGE)), FOUR)


@crafted
def storage_of_terabytes_in_the_old_format() -> bytes:
    value = tensor(
        (HUGE,), (1,), storage_=storage(HUGE, '0', 'FloatStorage', None)
    )
    return legacy(
        checkpoint(value), struct.pack('<q', HUGE) + bytes(64), ('0',)
    )


@crafted
def storage_of_negative_size() -> bytes:
    return archive(checkpoint(tensor((4,), (1,), count=-4)), FOUR)


@crafted
def storage_with_two_sizes() -> bytes:
    value = [tensor((4,), (1,)), tensor((1,), (1,), count=1)]
    return archive(checkpoint(value, 'meta'), FOUR)


@crafted
def storage_that_is_missing() -> bytes:
    return archive(checkpoint(tensor((4,), (1,))))


@crafted
def storage_with_a_path() -> bytes:
    value = tensor((4,), (1,), storage_=storage(4, '../../../../etc/passwd'))
    return archive(checkpoint(value), FOUR)


@crafted
def storage_of_another_type() -> bytes:
    return archive(
        checkpoint(tensor((4,), (1,), storage_=storage(4, '0', 'Linear'))),
        FOUR,
    )


@crafted
def shape_beyond_the_storage() -> bytes:
    return archive(checkpoint(tensor((HUGE,), (1,))), FOUR)


@crafted
def shape_that_repeats_one_element() -> bytes:
    return archive(checkpoint(tensor((HUGE,), (0,))), FOUR)


@crafted
def negative_shape() -> bytes:
    return archive(checkpoint(tensor((-4,), (1,))), FOUR)


@crafted
def negative_stride() -> bytes:
    return archive(checkpoint(tensor((2, 2), (-1, 1))), FOUR)


@crafted
def negative_offset() -> bytes:
    return archive(checkpoint(tensor((4,), (1,), offset=-1024)), FOUR)


@crafted
def offset_beyond_the_storage() -> bytes:
    return archive(checkpoint(tensor((4,), (1,), offset=HUGE)), FOUR)


@crafted
def stride_beyond_the_storage() -> bytes:
    return archive(checkpoint(tensor((2,), (HUGE,))), FOUR)


@crafted
def shape_of_text() -> bytes:
    return archive(checkpoint(tensor(('4',), (1,))), FOUR)


@crafted
def more_axes_than_strides() -> bytes:
    return archive(checkpoint(tensor((2, 2), (1,))), FOUR)


@crafted
def sparse_tensor_of_terabytes() -> bytes:
    parts = (tensor((1, 1), (1, 1)), tensor((1,), (1,)), (HUGE, HUGE))
    call = Call(
        Global('torch._utils', '_rebuild_sparse_tensor'),
        (Call(Global('torch.serialization', '_get_layout'),
              ('torch.sparse_coo',)), parts),
    )  # fmt: skip
    return archive(checkpoint(call), FOUR)


@crafted
def bytearray_of_gigabytes() -> bytes:
    call = Call(Global('builtins', 'bytearray'), (2**33,))
    return archive(checkpoint(call, 'meta'))


@crafted
def text_that_is_not_there() -> bytes:
    return archive(checkpoint(Raw(b'X\xff\xff\xff\x7fabc'), 'meta'))


@crafted
def zip_bomb() -> bytes:
    value = tensor((2**28,), (1,), count=2**28)
    return archive(
        checkpoint(value), {'data/0': bytes(2**24) * 4}, zipfile.ZIP_DEFLATED
    )


@crafted
def entries_that_overlap() -> bytes:
    data = bytearray(
        archive(checkpoint(tensor((4,), (1,))), {'data/0': bytes(16)})
    )
    # the size of the last entry, in both of its headers
    for mark, at in ((b'PK\x03\x04', 18), (b'PK\x01\x02', 20)):
        place = data.rindex(mark) + at
        data[place : place + 8] = struct.pack('<II', 2**31, 2**31)
    return bytes(data)


@crafted
def two_entries_of_one_name() -> bytes:
    out = io.BytesIO(archive(checkpoint(tensor((4,), (1,))), FOUR))
    with zipfile.ZipFile(out, 'a') as file:
        item = zipfile.ZipInfo('archive/data.pkl')
        file.infolist()
        file.NameToInfo.pop('archive/data.pkl')  # so that it does not warn
        file.writestr(item, pickled(Call(Global('os', 'system'), _touch())))
    return out.getvalue()


@crafted
def entry_outside_of_the_folder() -> bytes:
    return archive(checkpoint(1, 'meta'), {'../../ran': b'x'})


@crafted
def entry_with_an_absolute_path() -> bytes:
    return archive(checkpoint(1, 'meta'), FOUR, folder='/tmp/')


@crafted
def archive_in_an_archive() -> bytes:
    inner = reduce_of_system()
    return archive(checkpoint(1, 'meta'), {'data.zip': inner}) + inner


@crafted
def archive_after_a_comment() -> bytes:
    return archive(checkpoint(tensor((4,), (1,))), FOUR) + b'PK\x05\x06' * 9


# --- ways around a check -----------------------------------------------------


@crafted
def builder_whose_name_is_cut_elsewhere() -> bytes:
    builder = Global('torch', '_utils._rebuild_tensor_v2')
    arguments = (storage(4), 0, (HUGE,), (0,), False, ())
    return archive(checkpoint(Call(builder, arguments)), FOUR)


@crafted
def system_whose_name_is_cut_elsewhere() -> bytes:
    call = Call(Global('torch', 'os.system'), _touch())
    return archive(checkpoint(call))


@left_out
def array_at_an_address() -> bytes:
    call = Call(Global('numpy', 'ndarray'), ((1,), 'O', b'A' * 8))
    return archive(checkpoint(call, 'meta'))


@left_out
def weight_of_memory_that_nobody_set() -> bytes:
    call = Call(Global('torch', 'FloatTensor'), (10, 16))
    return archive(checkpoint(call))


@left_out
def tensor_of_a_constructor() -> bytes:
    call = Call(Global('torch', 'Tensor'), (2**20, 2**20))
    return archive(checkpoint(call))


@left_out
def parameter_of_terabytes() -> bytes:
    inner = Call(Global('torch', 'Tensor'), (HUGE,))
    builder = Global('torch._utils', '_rebuild_parameter')
    return archive(checkpoint(Call(builder, (inner, True, ()))))


@crafted
def strides_in_a_view_of_a_view() -> bytes:
    view = Call(
        Global('torch._utils', '_rebuild_parameter'),
        (tensor((2, 2), (HUGE, 1)), True, ()),
    )
    return archive(checkpoint(view), FOUR)


@crafted
def numbers_beyond_64_bits() -> bytes:
    return archive(checkpoint(tensor((0, 2**64), (1, 1))), FOUR)


@crafted
def state_of_a_tensor() -> bytes:
    build = Build(tensor((4,), (1,)), (storage(HUGE), 0, (HUGE,), (1,)))
    return archive(checkpoint([build, Global('os', 'system')]), FOUR)


@crafted
def half_an_element() -> bytes:
    call = Call(
        Global('torch._utils', '_rebuild_tensor_v3'),
        (storage(15, kind='UntypedStorage'), 0, (4,), (1,), False, (),
         Global('torch', 'float32')),
    )  # fmt: skip
    return archive(checkpoint(call), {'data/0': bytes(15)})


@crafted
def bool_of_seven() -> bytes:
    value = tensor((4,), (1,), storage_=storage(4, kind='BoolStorage'))
    return archive(checkpoint(value), {'data/0': bytes([0, 1, 7, 1])})


@crafted
def many_large_views_of_one_number() -> bytes:
    views = [tensor((2**20,), (0,), count=1) for _ in range(400)]
    return archive(checkpoint(views, 'meta'), {'data/0': bytes(4)})


@crafted
def nest_of_shared_lists() -> bytes:
    # each level holds the one before twice
    code = b']q\x00' + b''.join(
        b'0]q' + bytes([i]) + b'(' + 2 * (b'h' + bytes([i - 1])) + b'e'
        for i in range(1, 30)
    )
    return archive(checkpoint(Raw(code), 'meta'))


@crafted
def list_in_itself() -> bytes:
    return archive(checkpoint(Raw(b']q\x00h\x00a'), 'meta'))


@crafted
def nest_of_100_000_lists() -> bytes:
    return archive(checkpoint(Raw(b']' * 10**5 + b'a' * (10**5 - 1)), 'meta'))


@crafted
def two_million_objects() -> bytes:
    return archive(checkpoint(Raw(b'(' + b'N' * 2 * 10**6 + b't'), 'meta'))


@left_out
def keys_that_collide() -> bytes:
    prime = 2**61 - 1  # not made as a dict, which would take as long
    items = (opcodes(prime * i) + b'Ns' for i in range(1, 30_000))
    return archive(checkpoint(Raw(b'}' + b''.join(items)), 'meta'))


@left_out
def keys_that_are_tuples() -> bytes:
    return archive(checkpoint({(1, (2,)): 1}, 'meta'))


@crafted
def integer_of_a_million_digits() -> bytes:
    size = struct.pack('<i', 10**6)
    return archive(checkpoint(Raw(b'\x8b' + size + b'\x7f' * 10**6), 'meta'))


@crafted
def integer_as_text() -> bytes:
    return archive(checkpoint(Raw(b'L' + b'9' * 10**6 + b'L\n'), 'meta'))


@crafted
def numbers_in_another_byte_order() -> bytes:
    data = archive(checkpoint(tensor((4,), (1,))), FOUR)
    return data.replace(b'little', b'big   ')


@crafted
def more_pops_than_objects() -> bytes:
    return archive(Raw(b'0000'))


@crafted
def memo_that_was_never_set() -> bytes:
    return archive(checkpoint(Raw(b'h\x07'), 'meta'))


@crafted
def items_of_a_number() -> bytes:
    return archive(checkpoint(Raw(b'K\x01(K\x02K\x03u'), 'meta'))


@crafted
def list_of_pairs_for_storages() -> bytes:
    return legacy(checkpoint(tensor((4,), (1,))), keys=(('0', '0'),))


@crafted
def storages_named_twice() -> bytes:
    data = struct.pack('<q4f', 4, 1, 2, 3, 4)
    value = checkpoint(tensor((4,), (1,), count=8))
    return legacy(value, data * 2, keys=('0', '0'))


# --- damaged, or no checkpoint ---------------------------------------------


@crafted
def cut_archive() -> bytes:
    data = archive(checkpoint(tensor((4,), (1,))), FOUR)
    return data[: len(data) * 2 // 3]


@crafted
def pickle_without_an_end() -> bytes:
    return archive(Raw(b'}'))[:-22]


@crafted
def plain_pickle() -> bytes:
    return pickled(Call(Global('os', 'system'), _touch()))


@crafted
def old_tar_format() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as file:
        for name in ('../ran', 'storages', 'tensors', 'pickle'):
            content = pickled(Call(Global('os', 'system'), _touch()))
            item = tarfile.TarInfo(name)
            item.size = len(content)
            file.addfile(item, io.BytesIO(content))
    return out.getvalue()


@crafted
def empty_archive() -> bytes:
    return b'PK\x05\x06' + bytes(18)


@crafted
def nothing() -> bytes:
    return b''
