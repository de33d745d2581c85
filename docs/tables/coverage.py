"""Tables of backbones.md and files.md: what was tried, and what came out."""

import json
from collections import Counter

from benchmarks.coverage import row
from benchmarks.coverage.parts import part
from mmauxq.text import table

from .records import LOGS, number, rows


def backbones() -> str:
    """One network of each type of backbone."""
    text = (LOGS / 'backbones.jsonl').read_text()
    return row.as_markdown(row.from_json_lines(text))


def parts() -> str:
    """Hooks, constructors, evaluators and tools."""
    text = (LOGS / 'parts.jsonl').read_text()
    return part.as_markdown(part.from_json_lines(text))


def builds() -> str:
    """How many of all configs can be set up."""
    found = rows('builds.jsonl')
    verdicts = Counter(row['verdict'] for row in found)
    names = {
        'pass': 'pass',
        'mmpretrain': 'MMPretrain 1.2.0 cannot set them up in floating point '
        'either',
    }
    lines = [['all', len(found)]]
    lines += [[names.get(v, v), count] for v, count in verdicts.items()]
    return table(['configs', 'number'], lines)


def failed_builds() -> str:
    """What is said of those that MMPretrain cannot set up, shortened."""
    reasons: dict[str, list[str]] = {}
    for found in rows('builds.jsonl'):
        if found['verdict'] != 'pass':
            first = found['reason'].partition('. ')[0].partition('; ')[0]
            reasons.setdefault(first, []).append(found['config'])
    lines = []
    for reason, names in reasons.items():
        more = f', and {len(names) - 1} more' if names[1:] else ''
        lines.append([f'`{names[0]}`{more}', f'`{clean(reason)}`'])
    return table(['configs', 'what is said'], lines)


def clean(reason: str) -> str:
    """Without what a cell in code cannot hold."""
    return reason.replace('`', "'").replace('|', r'\|')


def kills() -> str:
    """Training and commands that were killed, and typed again."""
    runs = rows('resume_kills.jsonl')
    commands = rows('command_kills.jsonl')
    lines = [
        [
            'training, at a moment, step, validation or write',
            sum(len(run['killed']) for run in runs),
            len(runs),
            f'{sum(bool(run["differing"]) for run in runs)} runs differ in a '
            'bit from one that was not killed',
            '`python -m tests.stress.resume --kills 50 --out DIR`',
        ]
    ]
    for name in ('export', 'compare'):
        found = [each for each in commands if each['command'] == name]
        lost = sum(not each['complete'] for each in found)
        lines.append(
            [f'`{name}`, at a random moment', len(found), len(found),
             f'{lost} are incomplete when typed again',
             f'`python -m tests.stress.kills {name} --kills 50 --out DIR`']
        )  # fmt: skip
    head = ['what', 'kills', 'runs', 'result', 'repeat with']
    return table(head, lines)


DAMAGED = {
    'checkpoint': 'checkpoint',
    'old format': "checkpoint in torch's old format",
    'training': 'checkpoint that a training resumes from',
    'packed': '`packed.safetensors`',
    'comparison': '`comparison.json`',
    'results': '`results.jsonl`',
}
"""Name in the records -> what it is."""


def damage() -> str:
    """Files that were damaged at random, and what reading them did."""
    lines = []
    records = json.loads((LOGS / 'damage_cpu.json').read_text())
    for name, found in records.items():
        wrong = len(found['failures'])
        lines.append(
            [
                DAMAGED[name],
                f'{found["taken"] + found["refused"] + wrong:,}',
                f'{found["refused"]:,}',
                f'{found["taken"]:,}',
                wrong,
                f'{number(found["slowest"], 2)} s',
            ]
        )
    head = ['file', 'damaged', 'refused in one line', 'loaded in order',
            'anything else', 'slowest']  # fmt: skip
    return table(head, lines)


TABLES = {
    'backbones': backbones,
    'parts': parts,
    'builds': builds,
    'builds-failed': failed_builds,
    'kills': kills,
    'damage': damage,
}
