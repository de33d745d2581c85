"""What is known of a config, and the table of all of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from mmauxq.text import table


@dataclass
class Row:
    """What was found for one config.

    Args:
        config: Path below MMPretrain's ``configs``, or of a file.
        backbone: Its registered type.
        verdict: ``'pass'``, ``'fail'`` or ``'mmpretrain'``: the float network
            itself cannot be built or run here.
        reason: Why it does not pass, or what was changed to try it.
        parameters: Of F, in millions.
        quantized: Number of layers whose operands are quantized.
        kept: Name of a layer that stays float -> why.
        taps: Number of places that are read.
        layouts: Their tensor layouts, in order of appearance.
        guidance_parameters: Of H, in millions.
        guidance_multiply_adds: Of H over those of F.
        signed: Input quantizers that met negative values, and all of them.
        moved: Learned scales that the steps moved, and all of them.
        seconds: Wall time.
    """

    config: str
    backbone: str = ''
    verdict: str = 'fail'
    reason: str = ''
    parameters: float = 0.0
    quantized: int = 0
    kept: dict[str, str] = field(default_factory=dict)
    taps: int = 0
    layouts: list[str] = field(default_factory=list)
    guidance_parameters: float = 0.0
    guidance_multiply_adds: float = 0.0
    signed: tuple[int, int] = (0, 0)
    moved: tuple[int, int] = (0, 0)
    seconds: float = 0.0

    def note(self, text: str) -> None:
        """Add to the reason."""
        self.reason = '; '.join(filter(None, [self.reason, text]))


HEAD = (
    'backbone', 'config', 'F, M parameters', 'quantized / float layers',
    'taps', 'H, M parameters', 'H, multiply-adds', 'signed inputs', 's',
    'verdict',
)  # fmt: skip
ALIGN = 'llrrlrrrrl'
USUAL = ('first layer', 'classifier')
"""Why a layer stays float in nearly every network; not worth a note."""


def as_markdown(rows: Sequence[Row]) -> str:
    """The table, with the reasons below it."""
    passed = sum(row.verdict == 'pass' for row in rows)
    lines = [
        table(HEAD, map(_cells, rows), ALIGN),
        f'{passed} of {len(rows)} pass.',
        '',
        *(note for row in rows for note in _notes(row)),
    ]
    return '\n'.join(lines).rstrip() + '\n'


def _cells(row: Row) -> list[str]:
    return [
        row.backbone,
        row.config,
        f'{row.parameters:.2f}',
        f'{row.quantized} / {len(row.kept)}',
        f'{row.taps} ({", ".join(row.layouts)})' if row.taps else '-',
        f'{row.guidance_parameters:.2f}',
        f'{row.guidance_multiply_adds:+.1%}',
        f'{row.signed[0]} of {row.signed[1]}',
        f'{row.seconds:.0f}',
        row.verdict,
    ]


def _notes(row: Row) -> list[str]:
    notes = []
    if row.reason:
        notes.append(f'* {row.config}: {row.verdict}, {row.reason}')
    unusual: dict[str, list[str]] = {}
    for name, reason in row.kept.items():
        if reason not in USUAL:
            unusual.setdefault(reason, []).append(name)
    for reason, names in unusual.items():
        more = f' and {len(names) - 1} more' if names[1:] else ''
        notes.append(f'* {row.config}: float are {names[0]}{more}: {reason}')
    return notes


def as_json_lines(rows: Sequence[Row]) -> str:
    """One object per row."""
    return ''.join(json.dumps(asdict(row)) + '\n' for row in rows)


def from_json_lines(text: str) -> list[Row]:
    """The rows that :func:`as_json_lines` wrote."""
    return [Row(**json.loads(line)) for line in text.splitlines()]
