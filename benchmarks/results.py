"""``results.jsonl``: the rows that were measured so far."""

import json
import platform
from pathlib import Path

import torch


def read(out: Path) -> list[dict]:
    """All rows in the folder ``out``, in the order of measuring."""
    file = out / 'results.jsonl'
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def done(out: Path) -> set[str]:
    """Names of the measurements that have a row without an error."""
    return {row['arm'] for row in read(out) if 'error' not in row}


def append(out: Path, row: dict) -> None:
    """Add a row."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / 'results.jsonl').open('a') as file:
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
