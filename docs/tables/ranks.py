"""Tables of scaling.md: equal numbers on all ranks, and one that dies."""

from mmauxq.text import table

from .records import LOGS, rows


def runs(name: str) -> dict[str, list[dict]]:
    """Where it ran -> the lines of that run, for each file of this name."""
    files = sorted(LOGS.glob(f'{name}_*.jsonl'))
    found = {}
    for file in files:
        lines = rows(file.name)
        first = lines[0]
        on = 'GPUs' if first.get('nccl') or first.get('gpus') else 'processes'
        found[f'{first["ranks"]} {on}'] = lines
    return found


def equal_numbers() -> str:
    """What differs between ranks, and beside one process."""
    found = {
        where: {line['part']: line for line in lines}
        for where, lines in runs('ranks').items()
    }
    first = next(iter(found.values()))
    count = first['equal']
    lines = []
    for key, what in (
        ('calibrated', 'calibrated scales'),
        ('parameters', 'parameters, steps among them'),
        ('buffers', 'buffers after `SyncBuffersHook`'),
        ('buffers before', 'buffers before it'),
    ):
        cells = [each['equal'][key][0] for each in found.values()]
        allowed = '' if key == 'buffers before' else '0'
        lines.append([f'{what}, of {count[key][1]}', allowed, *cells])
    for part, key, what, allowed in (
        ('float', 'late', 'loss beside one process, 32 bits', '1e-04'),
        ('float', 'other_order', 'that process in other orders, at most', ''),
        ('whole', 'early', 'the same at 8 bits, in 5 steps', '1e-03'),
        ('whole', 'late', 'the same at 8 bits, in all steps', '1e-02'),
        ('whole', 'other_order', 'that process in other orders, at most', ''),
    ):
        values = [each.get(part, {}).get(key) for each in found.values()]
        cells = ['' if value is None else f'{value:.1e}' for value in values]
        lines.append([what, allowed, *cells])
    return table(['', 'allowed', *found], lines)


def dead_rank() -> str:
    """How a job ends whose rank dies, and how it goes on."""
    found = runs('dead_rank')
    lines = []
    for where, (end, *resumed, left) in found.items():
        lines.append(
            [where, 'end of the job after the death (allowed: 60 s)',
             f'{end["seconds_to_the_end"]} s, status {end["status"]}, '
             f'`{end["said"][0]}`']
        )  # fmt: skip
        for run in resumed:
            said = f'says `{run["said"][0]}`; ' if run['said'] else ''
            lines.append(
                [where, f'`--resume` on {run["ranks"]}',
                 f'{said}goes on at iteration {run["resumed"][0][1]}, ends '
                 f'with `{run["last"]}`']
            )  # fmt: skip
        lines.append(
            [where, 'ranks that outlive a launcher that is killed',
             len(left['orphans'])]
        )  # fmt: skip
    return table(['on', 'what', 'result'], lines)


TABLES = {'equal-numbers': equal_numbers, 'dead-rank': dead_rank}
