"""Files that are complete or absent."""

import os
import uuid
from pathlib import Path

from mmauxq.errors import TrainingError

PART = '.part'
"""What the name of a file ends in while it is being written."""


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write a file that is never seen half-written, whatever happens.

    It is written beside its place, flushed to the disk, and renamed. A
    process that dies leaves ``NAME.*.part`` behind, and what was there before.
    Several processes may write the same file.

    Raises:
        TrainingError: If the disk is full or fails; what was there before is
            unchanged, and no part is left.
    """
    path = Path(path)
    part = path.with_name(f'{path.name}.{uuid.uuid4().hex[:8]}{PART}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise TrainingError(
            f'{path} cannot be written: {error.strerror or error}; '
            'files that were complete before are unchanged'
        ) from error


def _sync_folder(path: Path) -> None:
    """Make the new name itself survive a power cut."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except OSError:  # some file systems do not open folders
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
