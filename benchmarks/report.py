"""The rows of ``results.jsonl`` as tables and a figure."""

from collections.abc import Sequence
from pathlib import Path

from mmauxq.compare.figures import COLOURS, plt
from mmauxq.text import table

from .recipes import PEER


def markdown(rows: Sequence[dict]) -> str:
    """All tables.

    Args:
        rows: As of :func:`.results.read`; of an arm that was measured twice,
            the last counts.
    """
    good = [row for row in rows if 'error' not in row]
    parts = []
    if good:
        machines = sorted({f'{r["device"]}, torch {r["torch"]}' for r in good})
        parts.append(f'Measured on {"; ".join(machines)}. Medians; in brackets'
                     ' the 10th and the 90th percentile.')  # fmt: skip
    kinds = {
        'Activation quantizers': ('ops/activations', _activations),
        'All weights of a network, forward and backward': (
            'ops/weights',
            _weights,
        ),
        'Training steps': ('step', _steps),
        'An iteration of tools/train.py': ('runner', _runner),
        'Several GPUs: tools/dist_train.sh': ('scaling', _scaling),
        'Data loader alone': ('loader', _loader),
        'Processor time of an epoch on digits': ('epoch', _epoch),
    }
    for title, (prefix, table_of) in kinds.items():
        of_kind = [r for r in good if r['arm'].startswith(prefix)]
        if of_kind:
            if prefix == 'loader':  # beside what the GPUs take
                of_kind += [r for r in good if r['arm'].startswith('scaling')]
            parts.append(f'## {title}\n\n{table_of(of_kind).rstrip()}')
    done = {row['arm'] for row in good}
    errors = sorted(
        {
            f'- `{row["arm"]}` {row.get("name", "")}: {row["error"]}'
            for row in rows
            # one that succeeded since did not fail
            if 'error' in row and ('name' in row or row['arm'] not in done)
        }
    )
    if errors:
        parts.append('## What failed\n\n' + '\n'.join(errors))
    return '\n\n'.join(parts) + '\n'


def _time(row: dict, prefix: str = '') -> str:
    if f'{prefix}ms' not in row:
        return ''
    text = f'{row[f"{prefix}ms"]:.3g}'
    if f'{prefix}low' in row:
        low, high = row[f'{prefix}low'], row[f'{prefix}high']
        text += f' ({low:.3g}-{high:.3g})'
    return text


def _percent(value: float | None) -> str:
    return '' if value is None else f'{value:.0%}'


def _activations(rows: Sequence[dict]) -> str:
    lines = [
        [
            ' x '.join(map(str, row['shape'])),
            f'{row["dtype"]}, {row["layout"]}',
            row['name'],
            _time(row, 'forward_'),
            _percent(row.get('forward_of_copy')),
            _time(row, 'backward_'),
            _percent(row.get('backward_of_copy')),
        ]
        for row in rows
    ]
    return table(
        ['shape', 'layout', 'op', 'forward ms', 'of a copy', 'backward ms',
         'of a copy'], lines,
    )  # fmt: skip


def _weights(rows: Sequence[dict]) -> str:
    lines = [
        [
            row['arm'].split('/')[-1],
            row['name'],
            str(row['weights']),
            f'{row["kernels_ms"]:.3g}' if 'kernels_ms' in row else '',
            _time(row, 'graph_'),
            _time(row, 'eager_'),
        ]
        for row in rows
    ]
    return table(
        ['network', 'form', 'weights', 'kernels ms', 'CUDA graph ms',
         'eager ms'], lines,
    )  # fmt: skip


def _steps(rows: Sequence[dict]) -> str:
    latest = {row['arm']: row for row in rows}
    lines = []
    for row in latest.values():

        def ratio(key: str, form: str, row: dict = row) -> str:
            base = latest.get(
                f'step/{row["network"]}/float/{form}/{row["batch"]}', {}
            ).get(key)
            value = row.get(key)
            return f'{value / base:.2f}' if base and value else ''

        memory = row.get('peak_gib')
        lines.append(
            [
                f'{row["network"]}, batch {row["batch"]}',
                row['what'],
                row['form'],
                _time(row),
                ratio('ms', 'compiled'),
                ratio('ms', 'eager'),
                '' if memory is None else f'{memory:.2f}',
                ratio('peak_gib', 'eager'),
            ]
        )
    return table(
        ['network', 'what', 'form', 'ms', 'of float compiled',
         'of float eager', 'peak GiB', 'of float eager'], lines,
    )  # fmt: skip


def _runner(rows: Sequence[dict]) -> str:
    latest = {row['arm']: row for row in rows}
    lines = []
    for row in latest.values():
        peer = f'runner/{row["network"]}/{PEER}/plain/{row["batch"]}'
        theirs = latest.get(peer, {}).get('ms')
        lines.append(
            [
                f'{row["network"]}, batch {row["batch"]}',
                row['what'],
                row['form'],
                _time(row),
                f'{row["ms"] / theirs:.2f}' if theirs else '',
                f'{row["data_ms"]:.2f}',
            ]
        )
    return table(
        ['network', 'what', 'form', 'ms', f'of {PEER} plain', 'data ms'],
        lines,
    )


def _scaling(rows: Sequence[dict]) -> str:
    latest = {row['arm']: row for row in rows}
    lines = []
    for row in latest.values():
        one = latest.get(f'{row["arm"].rpartition("/")[0]}/1')
        gpus, parts = row['gpus'], row.get('split') or {}
        peaks = row['peak_gib'] or []
        efficiency = one and row['images_per_s'] / one['images_per_s'] / gpus

        def alone(name: str, parts: dict = parts) -> str:
            if name not in parts:
                return ''
            return f'{parts[name]:.3g} of {parts[f"{name}_total"]:.3g}'

        lines.append(
            [
                f'{row["network"]}, batch {row["batch"]}',
                row['what'],
                row['form'],
                str(gpus),
                _time(row),
                f'{row["images_per_s"]:.0f}',
                f'{efficiency:.3f}' if one else '',
                ' '.join(f'{peak:.2f}' for peak in peaks),
                f'{row["data_ms"]:.2f}',
                f'{parts["computing"]:.4g}' if parts else '',
                alone('all_reduce'),
                alone('sync_bn'),
                f'{parts["idle"]:.3g}' if parts else '',
                f'{row["launch_s"]:.0f}',
                f'{row["end_s"]:.0f}' if 'end_s' in row else '',
            ]
        )
    return table(
        ['network', 'what', 'form', 'GPUs', 'ms', 'images/s', 'efficiency',
         'peak GiB of each', 'data ms', 'computing ms', 'all-reduce alone ms',
         'SyncBN alone ms', 'idle ms', 'launch s', 'end s'], lines,
    )  # fmt: skip


def _loader(rows: Sequence[dict]) -> str:
    latest = {row['arm']: row for row in rows}
    runs = [row for row in latest.values() if 'gpus' in row]
    runs.sort(key=lambda row: row['images_per_s'])
    fastest = {row['network']: row for row in runs}
    lines = []
    for row in latest.values():
        if 'workers' not in row:
            continue

        def spread(key: str, row: dict = row) -> str:
            if key not in row:  # written before there were decoders
                return ''
            return '{:.3g} ({:.3g}-{:.3g})'.format(*row[key])

        most = fastest.get(row['network'])
        lines.append(
            [
                row['network'],
                row.get('decoder', ''),
                f'{row["workers"]} of {row["cores"]}',
                f'{row["images_per_s"]:.0f}',
                f'{row["per_worker"]:.0f}',
                spread('processor_ms'),
                spread('of_opencv'),
                f'{row["kilobytes"]:.0f}',
                f'{most["images_per_s"]:.0f} ({most["gpus"]})' if most else '',
            ]
        )
    return table(
        ['network', 'decoder', 'processes of cores', 'images/s', 'of each',
         'processor ms of an image', 'of OpenCV', 'KB a file',
         'images/s that the GPUs take (GPUs)'], lines,
    )  # fmt: skip


def _epoch(rows: Sequence[dict]) -> str:
    lines = [
        [
            row['network'],
            f'{row["runner_s"]:.2f}',
            f'{row["plain_s"]:.2f} ({row["loader_s"]:.2f})',
            f'{row["ratio"]:.2f} '
            f'({row["ratio_low"]:.2f}-{row["ratio_high"]:.2f})',
            f'{row["added_us"]:.0f} '
            f'({row["added_us_low"]:.0f}-{row["added_us_high"]:.0f})',
            str(row['repeats']),
        ]
        for row in rows
    ]
    return table(
        ['network', 'tools/train.py s', 'plain loop s (its loader)', 'ratio',
         'added to train_step, us a step', 'epochs'], lines,
    )  # fmt: skip


def figure(rows: Sequence[dict], path: Path) -> None:
    """Draw time and memory of the steps as bars, if there are any.

    Args:
        rows: As of :func:`markdown`.
        path: Of the image.
    """
    latest = {
        row['arm']: row
        for row in rows
        if row['arm'].startswith('step/') and 'error' not in row
    }
    if not latest:
        return
    networks = list(
        dict.fromkeys((r['network'], r['batch']) for r in latest.values())
    )
    drawing, axes = plt.subplots(
        len(networks), 2, squeeze=False, layout='constrained',
        figsize=(9, 1 + 0.25 * len(latest) + 0.6 * len(networks)),
    )  # fmt: skip
    for (network, batch), (left, right) in zip(networks, axes, strict=True):
        bars = [
            row
            for row in latest.values()
            if (row['network'], row['batch']) == (network, batch)
        ]
        labels = [f'{row["what"]}, {row["form"]}' for row in bars]
        colours = [COLOURS[int(row['what'] != 'float')] for row in bars]
        spread = [
            [row['ms'] - row['low'] for row in bars],
            [row['high'] - row['ms'] for row in bars],
        ]
        left.barh(labels, [row['ms'] for row in bars], xerr=spread,
                  color=colours)  # fmt: skip
        left.set(xlabel='ms', title=f'{network}, batch {batch}')
        right.barh(labels, [row['peak_gib'] or 0 for row in bars],
                   color=colours)  # fmt: skip
        right.set(xlabel='peak GiB', yticks=[])
        for axis in (left, right):
            axis.invert_yaxis()
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


def write(rows: Sequence[dict], out: Path) -> None:
    """Write ``table.md`` and ``steps.png`` into the folder ``out``."""
    (out / 'table.md').write_text(markdown(rows))
    figure(rows, out / 'steps.png')
