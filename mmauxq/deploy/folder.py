"""A folder that is complete or as it was."""

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
    """``out``, if an export may be written there.

    Raises:
        UsageError: If it exists with other content than an export.
    """
    out = Path(out)
    if out.exists():
        if not out.is_dir():
            raise UsageError(f'--out {out} is a file; allowed is a folder')
        others = sorted(p.name for p in out.iterdir() if p.name not in FILES)
        if others:
            raise UsageError(
                f'--out {out} holds {others[0]}; allowed are a new folder, '
                'an empty one and an earlier export'
            )
    return out


@contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """A folder that takes the place of ``out`` when all went well.

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
