"""Tables of scaling.md: several GPUs, and reading files for them."""

from mmauxq.text import table

from .records import number, rows
from .speed import NETWORKS, OWN, runner

SCALING = 'scaling_h200.jsonl'
LOADER = 'loader_cpu.jsonl'
RECIPES = {
    'float': 'float',
    'w4a4': 'W4A4',
    'aux': 'W4A4 with the module',
    'kd': 'W4A4 with a teacher',
}
"""WHAT of the benchmark -> what it is."""
DECODERS = {
    'opencv-stacked': 'OpenCV; a batch leaves its process as one tensor',
    'turbojpeg': 'PyTurboJPEG 1 with libturbojpeg 2.1; '
    "`imdecode_backend='turbojpeg'` after `mmcv.use_backend('turbojpeg')`",
    'torchvision': '`decode_jpeg`',
    'pillow': "`imdecode_backend='pillow'`",
    'opencv-half': '`color_type=cv2.IMREAD_REDUCED_COLOR_2`: other pixels',
    'opencv-quarter': '`cv2.IMREAD_REDUCED_COLOR_4`: other pixels',
    'dali-cpu': 'NVIDIA DALI 2.4 in threads: decoded, cropped and flipped, '
    'no loader process',
}
"""Name of the benchmark -> what is other than OpenCV."""


def several_gpus() -> str:
    """Images a second by number of GPUs; the last row of a run counts."""
    runs = {
        (row.get('host', 'not named'), row['wrapper'], row['arm']): row
        for row in rows(SCALING)
    }
    lines = []
    for (host, wrapper, arm), row in runs.items():
        one = runs.get((host, wrapper, f'{arm.rpartition("/")[0]}/1'))
        parts = row.get('split') or {}
        form = '' if row['form'] == 'plain' else f', `{row["form"]}`'
        efficiency = ''
        if one:
            of_one = row['images_per_s'] / one['images_per_s']
            efficiency = f'{of_one / row["gpus"]:.2f}'
        lines.append(
            [
                f'{NETWORKS.get(row["network"], row["network"])}, '
                f'{RECIPES.get(row["what"], row["what"])}{form}, '
                f'batch {row["batch"]}',
                f'`{wrapper}`',
                host,
                row['gpus'],
                f'{row["images_per_s"]:,.0f}',
                efficiency,
                number(row['ms']),
                *(
                    number(parts.get(key))
                    for key in ('computing', 'all_reduce', 'sync_bn', 'idle')
                ),
            ]
        )
    head = [
        'recipe', 'wrapper', 'host', 'GPUs', 'images/s', 'efficiency', 'ms',
        'computing, ms', 'all-reduce alone, ms', 'SyncBN alone, ms',
        'idle, ms',
    ]  # fmt: skip
    if not lines:
        lines.append(['not yet run', *('' for _ in head[1:])])
    return table(head, lines)


def decoders() -> str:
    """Processor time beside OpenCV, with the smallest and largest turn."""
    found = {row['decoder']: row for row in rows(LOADER)}
    lines = []
    for name, other in DECODERS.items():
        parts = [
            '{:.2f} ({:.2f} to {:.2f})'.format(*found[name][key])
            if key in found[name]
            else ''
            for key in ('of_opencv', 'receiver_of_opencv')
        ]
        lines.append([f'`{name}`', *parts, other])
    head = ['decoder', "processor time, of OpenCV's",
            'that of the process that trains', 'what is other']  # fmt: skip
    return table(head, lines)


def cores() -> str:
    """Those that prepare images for a GPU that trains the recipe."""
    hosts = runner('r18', OWN['r18']).values()
    hosts = [arms for arms in hosts if 'aux/plain' in arms]
    row = min((arms['aux/plain'] for arms in hosts), key=lambda row: row['ms'])
    images = row['batch'] / row['ms'] * 1e3
    found = {row['decoder']: row for row in rows(LOADER)}
    milliseconds, low, high = found['opencv-stacked']['processor_ms']
    of_one = images * milliseconds / 1e3
    line = [
        f'{images:,.0f}',
        f'{milliseconds:.1f} ({low:.1f} to {high:.1f})',
        f'{of_one:.0f}',
        f'{8 * of_one:.0f}',
    ]
    head = ['images/s of a GPU', 'processor time of an image, ms',
            'cores for one GPU', 'for eight']  # fmt: skip
    return table(head, [line])


TABLES = {'several-gpus': several_gpus, 'decoders': decoders, 'cores': cores}
