"""A folder that is written completely, or left as it was."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmauxq.errors import UsageError

FILES = ('slim.pth', 'packed.safetensors', 'model.onnx', 'report.json',
         'report.md')  # fmt: skip


def check_folder(out: str | os.PathLike) -> Path:
    """``out``, or a UsageError if it is a file or holds anything but an
    export."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f'--out: expected a folder, got the file {out}')
    names = {file.name for file in out.iterdir()} if out.exists() else set()
    others = names - set(FILES)
    if others:
        raise UsageError(
            '--out: expected a new folder, an empty one or an earlier export, '
            f'got {out}, which holds {min(others)}'
        )
    return out


@contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """A new folder, which replaces ``out`` if nothing raises."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f'.{out.name}.', dir=out.parent))
    except OSError as error:
        raise UsageError(
            f'--out {out} cannot be written: {error.strerror}'
        ) from error
    try:
        yield part
        os.chmod(part, 0o755)
        if out.exists():
            shutil.rmtree(out)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
