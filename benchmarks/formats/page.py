"""The rows of ``formats.jsonl`` as a table."""

from collections.abc import Sequence

from mmauxq.cli.latency import QUIET, with_quartiles
from mmauxq.text import table

from .forms import PACKAGES, Row

HEAD = (
    'format', 'W/A', 'weights as', 'bytes', 'of float', 'runtime', 'loads',
    'runs', 'codes compared', 'at ties', 'by rounded biases', 'otherwise',
    'logits', 'speed-up', 'remark',
)  # fmt: skip
ALIGN = 'lllrrlllrrrrrrl'
LEGEND = """\
Bytes are those of the file, beside the network in float. Codes are integers of
activations, all of them compared with those of PyTorch, but for
`int8-residual`, which is another network. Logits differ from those that
PyTorch gives from the same codes by at most this part of the largest one.
Those of OpenVINO, and of `int8-residual`, are compared from the same images,
so that a code at a tie shows in them. OpenVINO gives codes from a copy of the
file, for which it may run other kernels. The speed-up is over the float file
in the same runtime, for one image on one thread: the median of the rounds, and
quartiles."""


def as_markdown(rows: Sequence[Row]) -> str:
    """The page of these rows, in their order."""
    parts = sorted({row['conditions'] for row in rows})
    parts += [table(HEAD, map(cells, rows), ALIGN).rstrip(), LEGEND]
    busy = max((row.get('busy') or 0.0 for row in rows), default=0.0)
    if busy > QUIET:
        parts.append(
            f'Other processes kept {busy:.1f} cores busy: the speed-ups are '
            'no evidence.'
        )
    return '\n\n'.join(parts) + '\n'


def cells(row: Row) -> Sequence[str]:
    """A row under :data:`HEAD`."""
    package = PACKAGES.get(row['runtime'], row['runtime'])
    size, base = row.get('bytes'), row.get('float_bytes')
    found = [row['form'], row['bits'], row.get('weights', '')]
    found += [f'{size:,}', f'{size / base:.0%}'] if size and base else ['', '']
    found += [f'{package} {row.get("version", "")}'.rstrip()]
    found += [
        {None: '', True: 'yes', False: 'no'}[row.get(key)]
        for key in ('loads', 'runs')
    ]
    found += [
        f'{row[key]:,}' if key in row else ''
        for key in ('codes', 'ties', 'rounded', 'unexplained')
    ]
    found += [f'{row["logits"]:.1e}' if 'logits' in row else '']
    found += [with_quartiles(row['speed_up']) if 'speed_up' in row else '']
    remark = row.get('error') or row.get('remark', '')
    return [*found, remark.replace('|', r'\|')]
