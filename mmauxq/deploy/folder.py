"""The folder of an export."""

import hashlib
import os
from pathlib import Path
from typing import Any

from mmauxq import files
from mmauxq.errors import UsageError

REPORT = 'report.json'
"""Comes last, with the SHA-256 of the others."""
SLIM, PACKED = 'slim.pth', 'packed.safetensors'
FILES = (SLIM, PACKED, 'model.onnx', 'report.md', REPORT)


def check_folder(out: str | os.PathLike) -> Path:
    """``out``, or a UsageError if an export there would replace a file that
    is not of an export."""
    out = Path(out)
    files.check_folder('--out', out)
    mine = [name for name in FILES if os.path.lexists(out / name)]
    for name in mine:
        if not (out / name).is_file():
            raise UsageError(f'--out: {out / name} is not a file')
    if mine and not files.left_over(out) and read_report(out) is None:
        raise UsageError(
            '--out: expected a folder without files of these names or one of '
            f'an earlier export, got {out}, which holds {mine[0]} but no '
            f'{REPORT} of an export'
        )
    return out


def read_report(out: Path) -> dict[str, Any] | None:
    """The report of the export in a folder; ``None`` if it has none."""
    try:
        report = files.parse_json((out / REPORT).read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(report, dict) and 'mmauxq_version' in report
    return report if ours else None


def checksums(out: Path) -> dict[str, str]:
    """The SHA-256 of each file of an export but its report.json, in hex."""
    return {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest()
        for name in FILES
        if name != REPORT
    }
