"""Files and folders that are complete, or as they were."""

import itertools
import json
import os
import resource
import stat
import subprocess
import sys
import threading

import pytest

from mmauxq import files
from mmauxq.errors import TrainingError, UsageError
from mmauxq.files import (
    check_file,
    check_folder,
    held_alone,
    left_over,
    link_atomically,
    parse_json,
    write_atomically,
    written_together,
)
from tests.support.file_operations import killed_at

NAMES = 'model', 'page', 'report'


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def write_all(folder, text):
    with written_together(folder, 'report') as part:
        for name in NAMES:
            write_atomically(part / name, f'{text} {name}'.encode())


def texts(folder):
    return {name: (folder / name).read_text().split()[0] for name in NAMES}


def test_two_writers_of_one_file(tmp_path):
    """As the ranks of a job: each leaves a complete file, none a part."""
    file = tmp_path / 'metrics.json'
    contents = [bytes([65 + i]) * 4096 for i in range(4)]
    failed = []

    def work(content):
        try:
            for _ in range(25):
                write_atomically(file, content)
                assert file.read_bytes() in contents
        except Exception as error:
            failed.append(error)

    writers = [
        threading.Thread(target=work, args=(content,)) for content in contents
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed
    assert names(tmp_path) == ['metrics.json']


# --- killed ----------------------------------------------------------------


def test_a_writer_that_is_killed_at_any_moment(tmp_path):
    found = []
    for number in itertools.count():
        file = tmp_path / str(number) / 'file'
        write_atomically(file, b'old old')
        if not killed_at(
            number, file.parent, lambda file=file: write_atomically(file, b'a')
        ):
            break
        found.append(file.read_bytes())
        write_atomically(file, b'again')
        assert names(file.parent) == ['file']
        assert file.read_bytes() == b'again'
    assert set(found) == {b'old old', b'a'}
    assert len(found) >= 4


def test_a_link_that_is_killed_at_any_moment(tmp_path):
    (tmp_path / 'old').write_text('old')
    link = tmp_path / 'last.pth'
    for number in itertools.count():
        link_atomically(link, 'old')
        if not killed_at(number, tmp_path, lambda: link_atomically(link, 'b')):
            break
        assert os.readlink(link) in ('old', 'b')
    assert number >= 3
    assert names(tmp_path) == ['last.pth', 'old']


def test_a_folder_that_is_killed_at_any_moment(tmp_path):
    """Each file is whole, and the last one is new only with the others."""
    found = set()
    for number in itertools.count():
        folder = tmp_path / str(number)
        write_all(folder, 'old')
        (folder / 'notes').write_text('of the user')
        if not killed_at(
            number, folder, lambda folder=folder: write_all(folder, 'new')
        ):
            break
        state = texts(folder)
        if state['report'] == 'new':
            assert set(state.values()) == {'new'}
        found.add(tuple(state.values()))
        write_all(folder, 'again')
        assert set(texts(folder).values()) == {'again'}
        assert names(folder) == sorted([*NAMES, 'notes'])
    assert number > 20
    assert {('old',) * 3, ('new',) * 3} < found


def test_a_first_folder_that_is_killed_at_any_moment(tmp_path):
    for number in itertools.count():
        folder = tmp_path / str(number) / 'deep'
        if not killed_at(
            number, tmp_path, lambda folder=folder: write_all(folder, 'new')
        ):
            break
        if folder.exists() and set(names(folder)) & set(NAMES):
            assert left_over(folder) or set(names(folder)) == set(NAMES)
        write_all(folder, 'again')
        assert names(folder) == sorted(NAMES)
    assert number > 20


def test_only_what_no_process_writes_is_swept(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    here, marks = files.platform.node(), '0123456789abcdef'
    own = f'{files._PROCESS}01234567'
    left = [
        f'x.{here}.{ended.pid}.{marks}.part',
        f'x.{here}.{os.getpid()}.{marks}.part',  # of another container
        f'x.old.host.1.{marks}.part',
    ]
    stay = [
        f'x.{here}.{os.getppid()}.{marks}.part',
        f'x.{here}.{os.getpid()}.{own}.part',
        f'x.other.1.{marks}.part',
        f'y.{here}.{ended.pid}.{marks}.part',
        'x.mine.part',
        'x.part',
    ]
    for name in [*left, *stay]:
        (tmp_path / name).touch()
    os.utime(tmp_path / left[2], (0, 0))
    write_atomically(tmp_path / 'x', b'')
    assert names(tmp_path) == sorted([*stay, 'x'])


# --- where nothing can be written ------------------------------------------


@pytest.mark.parametrize('kind', ['full', 'limit', 'interrupt'])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, kind):
    file = tmp_path / 'file'
    write_atomically(file, b'old')

    def fail(*args):
        raise KeyboardInterrupt if kind == 'interrupt' else OSError(28, 'Full')

    error, message = TrainingError, f'{file} cannot be written: Full; files'
    if kind == 'limit':
        message = 'cannot be written: File too large; files'
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    else:
        monkeypatch.setattr(os, 'fsync', fail)
        if kind == 'interrupt':
            error, message = KeyboardInterrupt, None
    try:
        with pytest.raises(error, match=message):
            write_atomically(file, bytes(5000))
    finally:
        if kind == 'limit':
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ['file'] and file.read_bytes() == b'old'


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    write_all(tmp_path / 'x', 'old')
    fsync, count = os.fsync, itertools.count()

    def fail(opened):
        if next(count) == 7:
            raise OSError(28, 'Full')
        fsync(opened)

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(TrainingError, match='cannot be written: Full'):
        write_all(tmp_path / 'x', 'new')
    assert set(texts(tmp_path / 'x').values()) == {'old'}
    assert names(tmp_path / 'x') == sorted(NAMES)


def build(kind, path):
    if kind == 'folder':
        path.mkdir()
    elif kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'loop':
        path.symlink_to(path.name)
    else:
        path.symlink_to({'device': '/dev/null'}.get(kind, 'nowhere'))


def what_it_is(path):
    """Without the time of the last access, which a look at a link changes."""
    found = os.lstat(path)
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


@pytest.mark.parametrize(
    'kind, what',
    [
        ('folder', 'a folder'),
        ('pipe', 'a device or a pipe'),
        ('device', 'a device or a pipe'),
        ('dangling', 'a link to nowhere'),
        ('loop', 'a link to nowhere'),
    ],
)
def test_a_place_that_is_not_of_a_file(tmp_path, kind, what):
    path = tmp_path / 'x'
    build(kind, path)
    before = what_it_is(path)
    with pytest.raises(
        TrainingError, match=f'cannot be written: It is {what}'
    ):
        write_atomically(path, b'new')
    with pytest.raises(
        UsageError, match=f'^--out {path} cannot be written: It is {what}$'
    ):
        check_file('--out', path)
    assert what_it_is(path) == before and names(tmp_path) == ['x']


@pytest.mark.parametrize('kind', ['file', 'pipe', 'device', 'loop', 'dangle'])
def test_a_place_that_is_not_of_a_folder(tmp_path, kind):
    path = tmp_path / 'x'
    path.touch() if kind == 'file' else build(kind, path)
    what = 'file' if path.exists() else 'dangling link'
    with pytest.raises(
        UsageError, match=f'^--out: expected a folder, got the {what} {path}$'
    ):
        check_folder('--out', path)
    check_folder('--out', tmp_path)
    check_folder('--out', tmp_path / 'new')


def test_a_checked_file_is_as_it_was(tmp_path):
    check_file('--out', tmp_path / 'new' / 'file')
    assert names(tmp_path / 'new') == []
    (tmp_path / 'file').write_text('old')
    check_file('--out', tmp_path / 'file')
    assert (tmp_path / 'file').read_text() == 'old'
    with pytest.raises(UsageError, match='x cannot be written: File exists'):
        check_file('--out', tmp_path / 'file' / 'x')


@pytest.mark.parametrize(
    'text', ['[' * 10**6, '{"a":' * 10**6, '"' + '\\"' * 10**6, '[' * 101]
)
def test_json_that_brings_the_process_down(text):
    """Where another package has raised the limit of recursion."""
    with pytest.raises(ValueError):
        parse_json(text)


def test_json():
    value = [[{'a': r'[[{\"', 'b': '\\'}] * 200, '[' * 200, [[[[1.5]]]]]
    assert parse_json(json.dumps(value)) == value
    assert parse_json('[' * 100 + ']' * 100)


# --- links, modes, and the files of the user -------------------------------


def test_links_stay_links(tmp_path):
    target = tmp_path / 'real' / 'file'
    write_atomically(target, b'old')
    (tmp_path / 'file').symlink_to('real/file')
    (tmp_path / 'folder').symlink_to('real')
    write_atomically(tmp_path / 'file', b'one')
    assert target.read_bytes() == b'one'
    write_atomically(tmp_path / 'folder' / 'file', b'two')
    assert target.read_bytes() == b'two'
    write_all(tmp_path / 'folder', 'new')
    assert names(target.parent) == ['file', *NAMES]
    assert (tmp_path / 'file').is_symlink()
    assert (tmp_path / 'folder').is_symlink()


def test_new_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_all(tmp_path / 'x', 'new')
    finally:
        os.umask(before)
    modes = {
        stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / 'x').iterdir()
    }
    assert modes == {0o640}


def test_what_the_user_puts_there_meanwhile_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'before').write_text('1')
    with written_together(files.Path('.'), 'report') as part:
        (tmp_path / 'meanwhile').write_text('2')
        (part / 'report').write_text('new')
    assert names(tmp_path) == ['before', 'meanwhile', 'report']


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    for wanted in (tmp_path / 'a' / 'b', tmp_path):
        with pytest.raises(KeyError):
            with written_together(wanted, 'report') as part:
                (part / 'model').write_text('new')
                raise KeyError
        assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UsageError, match='cannot be written: Not a directory'):
        write_all(tmp_path / 'file' / 'x', 'new')


HOLD = """
import sys
from pathlib import Path
from mmauxq.files import held_alone
with held_alone('--out', Path(sys.argv[1])):
    print('held', flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_another_process_holds(tmp_path, root):
    folder = tmp_path / 'new' / 'folder'
    with subprocess.Popen(
        [sys.executable, '-c', HOLD, folder],
        cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == 'held\n'
        with pytest.raises(UsageError) as caught, held_alone('--out', folder):
            pass
        process.kill()
    assert str(caught.value) == (
        '--out: expected a folder in which nobody is at work, got '
        f'{folder}, where another command is'
    )
    with held_alone('--out', folder):
        assert names(folder) == []


def test_a_folder_to_hold_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UsageError, match='--out .*: Not a directory'):
        with held_alone('--out', tmp_path / 'file' / 'x'):
            pass
