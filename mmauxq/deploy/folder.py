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
    """Check that an export may be written to ``out``.

    Raises:
        UsageError: If it is a file, or holds something else than an export.
    """
    out = Path(out)
    if out.exists():
        if not out.is_dir():
            raise UsageError(f'--out: expected a folder, got the file {out}')
        others = sorted(p.name for p in out.iterdir() if p.name not in FILES)
        if others:
            raise UsageError(
                '--out: expected a new folder, an empty one or an earlier '
                f'export, got {out}, which holds {others[0]}'
            )
    return out


@contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """A new folder, which replaces ``out`` if nothing raises.

    Raises:
        UsageError: If it cannot be written.
    """
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
