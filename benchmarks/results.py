"""``results.jsonl``, and files like it: the rows that were measured so far."""

import json
import platform
from pathlib import Path

import torch

FILE = 'results.jsonl'


def read(out: Path, name: str = FILE, of: dict | None = None) -> list[dict]:
    """Rows of a file in the folder ``out``, in the order of measuring.

    Args:
        out: Folder.
        name: Of the file.
        of: Rows with this entry ``of`` count, or those without one.
    """
    file = out / name
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    wanted = json.loads(json.dumps(of))
    return [row for row in rows if row.get('of') == wanted]


def done(out: Path, name: str = FILE, of: dict | None = None) -> set[str]:
    """Names of the measurements that have a row without an error; arguments
    as of :func:`read`."""
    return {r['arm'] for r in read(out, name, of) if 'error' not in r}


def append(out: Path, row: dict, name: str = FILE) -> None:
    """Add a row to a file of the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / name).open('a') as file:
        file.write(json.dumps(row) + '\n')


def machine() -> dict[str, str]:
    """The part of a row that says on what it was measured."""
    return dict(
        device=torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f'CPU, {torch.get_num_threads()} threads',
        torch=torch.__version__,
        python=platform.python_version(),
    )
