"""Files and folders that are complete, or as they were."""

import errno
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmauxq.errors import TrainingError, UsageError

PART = '.part'
"""What the name of a file ends in while it is being written."""
HIDDEN = '.mmauxq'
"""What the name of a hidden folder begins with."""
DAY = 24 * 3600
"""Seconds after which a part of another machine is taken for left over."""
_PROCESS = uuid.uuid4().hex[:8]  # a later process may have the same number


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write a file that is never seen half-written, whatever happens.

    It is written beside its place, flushed to the disk, and renamed. A
    process that is killed leaves ``NAME.*.part`` behind, which the next one
    that writes the same file removes, and what was there before. Several
    processes may write the same file. A link to a file is followed.

    Raises:
        TrainingError: If the disk is full or fails, or the path leads to
            something other than a file; what was there before is unchanged,
            and no part is left.
    """

    def write(part: Path) -> None:
        with open(part, 'xb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    with _explained(path):
        _put(_real(path), write)


def link_atomically(path: Path, name: str) -> None:
    """Make ``path`` a link to its neighbour ``name``; errors as above."""
    with _explained(path):
        _put(path, lambda part: part.symlink_to(name))


def check_file(option: str, path: str | os.PathLike) -> None:
    """Raise a UsageError if :func:`write_atomically` could not write there.

    Args:
        option: That the path was given to, for the message.
        path: Its folder is made if there is none.
    """
    try:
        part = _begin_part(_real(path))
        part.touch()
        part.unlink()
    except OSError as error:
        raise UsageError(
            f'{option} {path} cannot be written: {error.strerror}'
        ) from error


def check_folder(option: str, path: str | os.PathLike) -> None:
    """Raise a UsageError if a path is neither free nor that of a folder."""
    if os.path.lexists(path) and not os.path.isdir(path):
        kind = 'file' if os.path.exists(path) else 'dangling link'
        raise UsageError(f'{option}: expected a folder, got the {kind} {path}')


@contextmanager
def held_alone(option: str, folder: Path) -> Iterator[None]:
    """Keep a folder from other processes that would hold it, too. It is made
    if there is none. A process that ends, in whatever way, holds no more.

    Args:
        option: That the folder was given to, for the message.
        folder: On a file system without locks it is not kept.

    Raises:
        UsageError: If another process holds it, or it cannot be made.
    """
    import fcntl  # not on Windows

    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(
            f'{option} {folder} cannot be written: {error.strerror}'
        ) from error
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f'{option}: expected a folder in which nobody is at work, got '
                f'{folder}, where another command is'
            ) from error
        except OSError:  # no locks here
            pass
        yield
    finally:
        os.close(held)


@contextmanager
def written_together(folder: Path, last: str) -> Iterator[Path]:
    """A hidden folder inside of ``folder``, which its files leave at the end.

    Until then ``folder`` is as it was, and so it stays if something raises.
    Files of the same names are replaced, each at once; other files, also new
    ones, stay. A process that is killed leaves the hidden folder, which the
    next one that gets to its end removes.

    Args:
        folder: Made if there is none.
        last: Name of the file that comes last: it may hold the checksums of
            the others, so that a kill between them shows.

    Raises:
        UsageError: If the folder cannot be written to.
        TrainingError: If the files cannot take their places.
    """
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        part = _begin_part(folder / HIDDEN)
        part.mkdir()
    except OSError as error:
        raise UsageError(
            f'folder {folder} cannot be written: {error.strerror}'
        ) from error
    try:
        yield part
        with _explained(folder):
            files = sorted(part.iterdir(), key=lambda file: file.name == last)
            for file in files:
                _sync(file)
            for file in files:
                os.replace(file, folder / file.name)
            _sync_folder(folder)
            _sweep(folder / HIDDEN)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for path in new:
            with suppress(OSError):  # it holds something now
                path.rmdir()


def left_over(folder: Path) -> bool:
    """Whether :func:`written_together` was killed in this folder."""
    return any(_parts(folder / HIDDEN))


def parse_json(text: str) -> Any:
    """What ``json.loads`` gives, which a deep nest would bring down.

    Raises:
        ValueError: If it is not JSON, or nested more than 100 deep.
    """
    depth = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"?|[][{}]', text, re.DOTALL):
        depth += (token[0] in '[{') - (token[0] in ']}')
        if depth > 100:
            raise ValueError('nested more than 100 deep')
    return json.loads(text)


@contextmanager
def _explained(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f'{path} cannot be written: {error.strerror or error}; '
            'files that were complete before are unchanged'
        ) from error


def _real(path: str | os.PathLike) -> Path:
    """The file, there or not, that a path leads to.

    Raises:
        OSError: If it leads to something that cannot be replaced by a file.
    """
    real = Path(os.path.realpath(path))
    if os.path.lexists(path) and not real.is_file():
        kind = 'a folder' if real.is_dir() else 'a device or a pipe'
        if not real.exists():
            kind = 'a link to nowhere'
        raise OSError(errno.EEXIST, f'It is {kind}')
    return real


def _put(path: Path, make: Callable[[Path], None]) -> None:
    part = _begin_part(path)
    try:
        make(part)
        os.replace(part, path)
    finally:
        with suppress(OSError):  # as a rule it is in its place
            part.unlink()
    _sync_folder(path.parent)
    _sweep(path)


def _begin_part(path: Path) -> Path:
    """A free name beside ``path`` that says whose it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = f'{platform.node()}.{os.getpid()}.{_PROCESS}'
    return path.with_name(f'{path.name}.{owner}{uuid.uuid4().hex[:8]}{PART}')


def _parts(path: Path) -> Iterator[tuple[Path, re.Match]]:
    """All parts of ``path``, with machine, process and its mark."""
    pattern = re.compile(
        rf'{re.escape(path.name)}\.(.*)\.(\d+)\.(\w{{8}})\w{{8}}{PART}'
    )
    for part in path.parent.iterdir():
        if match := pattern.fullmatch(part.name):
            yield part, match


def _sweep(path: Path) -> None:
    """Remove the parts of ``path`` that no living process writes."""
    with suppress(OSError):  # others may sweep, too
        for part, owner in _parts(path):
            if not _is_left(part, *owner.groups()):
                continue
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink()


def _is_left(part: Path, machine: str, process: str, mark: str) -> bool:
    if machine != platform.node():
        return time.time() - part.lstat().st_mtime > DAY
    if int(process) == os.getpid():  # in a container, often of each run
        return mark != _PROCESS
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def _sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    with suppress(OSError):  # some file systems cannot
        _sync(path)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
