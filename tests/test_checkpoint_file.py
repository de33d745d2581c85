"""Files from strangers: refused in one line, nothing runs, no memory."""

import json
import pickletools
import zipfile

import pytest
import torch
from mmengine.runner import CheckpointLoader
from mmengine.runner import load_checkpoint as load_mmengine

from mmauxq import compat
from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.deploy import slim_checkpoint
from mmauxq.engine.resume import load_resumable
from mmauxq.errors import UsageError
from mmauxq.pickle_opcodes import LEAST
from tests.networks import joint_qat
from tests.support.crafted import (
    CRAFTED,
    FOUR,
    LEFT_OUT,
    Raw,
    archive,
    checkpoint,
    legacy,
    tensor,
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('name', sorted(CRAFTED.keys() - LEFT_OUT))
def test_crafted_file_is_refused(tmp_path, name):
    path = tmp_path / 'crafted.pth'
    path.write_bytes(CRAFTED[name]())
    with pytest.raises(UsageError) as caught:
        read_checkpoint(path)
    text = str(caught.value)
    assert '\n' not in text and str(path) in text and len(text) < 400
    assert 'is refused because it holds' in text or 'is truncated or' in text
    assert not (tmp_path / 'ran').exists()
    assert [p.name for p in tmp_path.iterdir()] == ['crafted.pth']


def test_there_are_enough():
    assert len(CRAFTED) > 70


@pytest.mark.parametrize('name', sorted(LEFT_OUT))
def test_what_nobody_needs_is_left_out(tmp_path, name):
    """Nothing of it is called, and nothing of it comes through."""
    (tmp_path / 'c.pth').write_bytes(CRAFTED[name]())
    content = read_checkpoint('c.pth')
    assert [p.name for p in tmp_path.iterdir()] == ['c.pth']
    content.setdefault('meta', {})
    expected = checkpoint({}, 'meta')
    if content['meta']:
        expected = checkpoint(None)
        expected['state_dict'].clear()
    content['state_dict'] = {
        k: v for k, v in content['state_dict'].items() if v is not None
    }
    assert content == expected


@pytest.mark.parametrize(
    'name, reason',
    [
        ('storage beyond its entry', 'claims 16384 bytes and has 16'),
        ('shape that repeats one element', 'in a storage of 4 elements'),
        ('negative offset', r'negative number in \[-1024, 4, 1\]'),
        ('zip bomb', 'compressed entries'),
        ('two entries of one name', 'two entries of one name'),
        ('entry outside of the folder', r"path 'archive/../../ran'"),
        ('nest of shared lists', 'a nest of more than 300000 values'),
        ('reduce of system', 'posix.system'),
        ('torchscript program', 'a TorchScript program'),
        ('bytearray of gigabytes', 'builtins.bytearray'),
    ],
)
def test_the_reason_is_said(tmp_path, name, reason):
    (tmp_path / 'c.pth').write_bytes(CRAFTED[name]())
    with pytest.raises(UsageError, match=f'it holds .*{reason}'):
        read_checkpoint('c.pth')


def test_honest_files_made_the_same_way_load(tmp_path):
    """The builder itself is not what is refused."""
    value = checkpoint(tensor((2, 2), (2, 1)))
    for data in (archive(value, FOUR),):
        (tmp_path / 'c.pth').write_bytes(data)
        state = read_checkpoint('c.pth')['state_dict']
        assert state['w'].tolist() == [[1, 2], [3, 4]]
    (tmp_path / 'c.pth').write_bytes(legacy(checkpoint(1, 'meta')))
    assert read_checkpoint('c.pth')['meta'] == 1


@pytest.mark.parametrize('new_format', [True, False])
def test_what_torch_saves_loads(tmp_path, new_format):
    base = torch.arange(24.0)
    value = {
        'views': [base[3:9], base.view(4, 6).t(), base[0]],
        'dtypes': [
            torch.zeros(3, dtype=getattr(torch, name))
            for name in (
                'float16', 'bfloat16', 'float64', 'int8', 'uint8', 'int16',
                'int32', 'int64', 'bool', 'complex64',
            )
        ],
        'empty': torch.zeros(0, 5),
        'scalar': torch.tensor(7),
        'expanded': torch.ones(1).expand(5, 5),
        'parameter': torch.nn.Parameter(torch.ones(2)),
        'size': torch.Size([1, 2]),
        'dtype': torch.float32,
        'set': {1, 2},
    }  # fmt: skip
    torch.save(value, 'c.pth', _use_new_zipfile_serialization=new_format)
    loaded = read_checkpoint('c.pth')
    assert torch.equal(loaded['views'][1], value['views'][1])
    assert [t.dtype for t in loaded['dtypes']] == [
        t.dtype for t in value['dtypes']
    ]
    assert loaded['expanded'].stride() == (0, 0)
    assert loaded['empty'].shape == (0, 5)


def test_a_large_training_checkpoint_loads(tmp_path):
    """More opcodes than a small file may have: 700 layers, with AdamW."""
    layers = [
        part
        for _ in range(700)
        for part in (torch.nn.Conv2d(2, 2, 1), torch.nn.BatchNorm2d(2))
    ]
    network = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2, 2, 1, 2)).sum().backward()
    optimizer.step()
    state = network.state_dict()
    torch.save([state, state | {}, optimizer.state_dict()], 'c.pth')
    with zipfile.ZipFile('c.pth') as file:
        opcodes = pickletools.genops(file.read('c/data.pkl'))
    assert sum(1 for _ in opcodes) > LEAST
    loaded, _, stored = read_checkpoint('c.pth')
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert len(stored['state']) == 2800


@pytest.mark.parametrize('dtype', ['uint16', 'float8_e4m3fn'])
def test_new_dtypes(tmp_path, dtype):
    torch.save(torch.zeros(3).to(getattr(torch, dtype)), 'c.pth')
    assert read_checkpoint('c.pth').dtype is getattr(torch, dtype)


def test_no_memory_is_taken(run_python, tmp_path):
    """All of them in one process: its peak hardly moves."""
    for index, build in enumerate(CRAFTED.values()):
        (tmp_path / f'{index}.pth').write_bytes(build())
    code = (
        'import glob, json, resource\n'
        'from mmauxq.checkpoint_file import UsageError, read_checkpoint\n'
        'peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
        'before, refused = peak(), 0\n'
        'for name in glob.glob("*.pth"):\n'
        '    try: read_checkpoint(name)\n'
        '    except UsageError: refused += 1\n'
        'print(json.dumps([refused, (peak() - before) / 1024]))\n'
    )
    done = run_python('-c', code)
    assert done.returncode == 0, done.stderr
    refused, grown = json.loads(done.stdout)
    assert refused == len(CRAFTED) - len(LEFT_OUT)
    assert grown < 200, f'{grown} MiB'


def test_a_memo_of_any_index_takes_no_memory(tmp_path):
    """The unpickler in C would reserve 16 GiB for it."""
    value = checkpoint(Raw(b'Nr\xff\xff\xff\x7f'), 'meta')
    (tmp_path / 'c.pth').write_bytes(archive(value))
    assert read_checkpoint('c.pth')['meta'] is None


def test_torch_still_believes_what_it_reads(tmp_path):
    """If this fails, torch checks its views, and less is needed here."""
    data = CRAFTED['shape that repeats one element']()
    (tmp_path / 'c.pth').write_bytes(data)
    value = torch.load('c.pth', weights_only=True)['state_dict']['w']
    assert value.numel() == 2**40


READERS = {
    'mmengine load_checkpoint': lambda path: load_mmengine(
        torch.nn.Linear(1, 1), path
    ),
    'mmengine CheckpointLoader': lambda path: CheckpointLoader.load_checkpoint(
        path, 'cpu'
    ),
    'slim': lambda path: slim_checkpoint(path, 'slim.pth'),
    'resume': load_resumable,
    'float_checkpoint': lambda path: joint_qat(
        guidance=None, float_checkpoint=path
    ),
}


@pytest.mark.parametrize('reader', READERS)
def test_every_api_refuses(tmp_path, reader):
    compat.enable()
    names = sorted(CRAFTED.keys() - LEFT_OUT)
    # those of one kind take the same way; a network is built each time
    names = names[:: 12 if reader == 'float_checkpoint' else 4]
    for name in names:
        (tmp_path / 'c.pth').write_bytes(CRAFTED[name]())
        with pytest.raises(UsageError, match='c.pth is '):
            READERS[reader]('c.pth')
        assert [p.name for p in tmp_path.iterdir()] == ['c.pth'], name
