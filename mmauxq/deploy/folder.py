"""The folder of an export."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmauxq import files
from mmauxq.errors import UsageError

REPORT = 'report.json'
"""Comes last, with the SHA-256 of the others."""
SLIM, PACKED = 'slim.pth', 'packed.safetensors'
FILES = (SLIM, PACKED, 'model.onnx', 'report.md', REPORT)


def check_folder(
    out: str | os.PathLike,
    names: Sequence[str] = FILES,
    what: str = 'export',
) -> Path:
    """``out``, or a UsageError if a command would replace a file there that
    is not of its own.

    Args:
        out: Folder, there or not.
        names: Of the files that the command writes; its report is the last.
        what: The command makes, for the message.
    """
    out, report = Path(out), names[-1]
    files.check_folder('--out', out)
    mine = [name for name in names if os.path.lexists(out / name)]
    for name in mine:
        if not (out / name).is_file():
            raise UsageError(f'--out: {out / name} is not a file')
    if mine and not files.left_over(out) and read_report(out, report) is None:
        raise UsageError(
            '--out: expected a folder without files of these names or one of '
            f'an earlier {what}, got {out}, which holds {mine[0]} but no '
            f'{report} of an {what}'
        )
    return out


def read_report(out: Path, name: str = REPORT) -> dict[str, Any] | None:
    """The report of a command in a folder; ``None`` if it has none."""
    try:
        report = files.parse_json((out / name).read_text())
    except (OSError, ValueError):
        return None
    ours = isinstance(report, dict) and 'mmauxq_version' in report
    return report if ours else None


def checksums(out: Path, names: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of each file of an export but its report.json, in hex."""
    return {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest()
        for name in names
        if name != REPORT
    }
