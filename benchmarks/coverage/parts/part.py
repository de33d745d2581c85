"""A part, how it is tried, what was found, and the table of all of them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmauxq.text import table

TRAIN = '{mmauxq} train config.py --work-dir run'
TEST = '{mmauxq} test config.py run/slim.pth'

NOT_FOR = 'not for classifiers'
"""Verdict on a part that no classifier can be used with."""


@dataclass(frozen=True)
class Part:
    """How a part is tried.

    Args:
        name: ``REGISTRY/SCOPE.TYPE``, with a word behind it if there are
            several rows of one type.
        settings: Statements of the config. They find ``architecture``,
            ``optim_wrapper`` and the other sections of :mod:`.project`.
        network: ``'resnet'`` or ``'vit'``.
        data: ``'noise'``, ``'images'`` or ``'labels'`` (several for each
            image).
        commands: What is typed, one after the other, until one fails.
        text: The whole config, instead of ``settings``.
        shared: Whether the commands find a trained network, which all such
            parts share, in ``run``.
        says: Pattern of what the commands print.
        leaves: Glob of a file that they leave.
        check: Given the folder, says what is wrong there, or nothing.
        own: Whether a failure is MMAuxQ's own, although the float network
            fails with the same message.
        expect: The verdict.
        because: Pattern of the message of a command that fails.
        why: Reason of the verdict; by default the message.
    """

    name: str
    settings: str = ''
    network: str = 'resnet'
    data: str = 'noise'
    commands: Sequence[str] = (TRAIN,)
    text: str = ''
    shared: bool = False
    says: str = ''
    leaves: str = ''
    check: Callable[[Path], str] | None = None
    own: bool = False
    expect: str = 'works'
    because: str = ''
    why: str = ''

    @property
    def registered(self) -> str:
        """The name without the word that tells rows apart."""
        return self.name.partition(' ')[0]

    @property
    def kind(self) -> str:
        """Registry, ``'tools'`` or ``'variants'``."""
        return self.name.partition('/')[0]


@dataclass
class Row:
    """What was found for one part.

    Args:
        part: Its name.
        source: Module or file that it comes from.
        verdict: ``'works'``, ``'refused'``, ``'not for classifiers'``,
            ``'needs'`` (a package), ``'mmpretrain'``: the float network fails
            in the same way, or ``'fails'``.
        reason: Why it does not work.
        expected: Whether the verdict and the reason are as the table of parts
            says.
        seconds: Wall time.
    """

    part: str
    source: str = ''
    verdict: str = 'fails'
    reason: str = ''
    expected: bool = False
    seconds: float = 0.0

    @property
    def words(self) -> str:
        """Verdict and reason."""
        if self.verdict == 'needs':
            return f'needs {self.reason}'
        return ': '.join(filter(None, [self.verdict, self.reason]))


HEAD = 'part', 'comes from', 'verdict', 's'


def as_markdown(rows: Sequence[Row]) -> str:
    """The table, and the number of rows by verdict below it."""
    cells = [
        [
            row.part,
            row.source,
            row.words.replace('|', '\\|')
            + ('' if row.expected else ' **(unexpected)**'),
            f'{row.seconds:.0f}',
        ]
        for row in rows
    ]
    verdicts = [row.verdict for row in rows]
    counts = [f'{verdicts.count(v)} {v}' for v in dict.fromkeys(verdicts)]
    wrong = sum(not row.expected for row in rows)
    return (
        table(HEAD, cells, 'lllr')
        + f'\n{len(rows)} rows: {", ".join(counts)}; {wrong} unexpected.\n'
    )


def as_json_lines(rows: Sequence[Row]) -> str:
    """One object per row."""
    return ''.join(json.dumps(asdict(row)) + '\n' for row in rows)


def from_json_lines(text: str) -> list[Row]:
    """The rows that :func:`as_json_lines` wrote."""
    return [Row(**json.loads(line)) for line in text.splitlines()]
