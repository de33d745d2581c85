"""Tables of export.md: exported forms in their runtimes."""

import json
from functools import cache, partial

from benchmarks.formats.page import ALIGN, HEAD, cells
from mmauxq.compare.comparison import by_arm, collect
from mmauxq.compare.statistics import spread
from mmauxq.text import table

from .records import LOGS, rows
from .runs import arm_rows, finals, paired, without_wins

MOBILE = {
    'floatcont': 'float, trained on',
    'qat-w4a16': 'W4A16',
    'aux-w4a16': 'W4A16 with the module',
    'qat-w4a8': 'W4A8',
    'aux-w4a8': 'W4A8 with the module',
    'qat-w2a8': 'W2A8',
    'aux-w2a8': 'W2A8 with the module',
}
"""Arm -> what it is."""


def latest_formats(network: str) -> dict[str, dict]:
    """W/A/FORM/RUNTIME -> the last row of it, also where it was refused."""
    found = rows(f'formats_{network}.jsonl', failed=True)
    return {row['arm']: row for row in found}


def formats(network: str) -> str:
    """What ``python -m benchmarks.formats`` found of a network."""
    return table(HEAD, map(cells, latest_formats(network).values()), ALIGN)


TIMED = {
    'configs/qat_r18_w4a4.py': 'ResNet-18',
    'configs/qat_r50_w4a4.py': 'ResNet-50',
    'mobilenet-v2_8xb32_in1k_w4a4.py': 'MobileNetV2',
}
"""Config -> its network."""
BEST = ('openvino', 'int8')
"""The fastest form that keeps the codes, and its runtime."""
RESIDUAL = ('onnxruntime', 'int8, residual int8')
"""The fastest form in ONNX Runtime."""
FORM_AIMS = {'ResNet-18': 2.5, 'ResNet-50': 2.5, 'MobileNetV2': 1.5}
"""Network -> the speed-up of an int8 file over the float file that was aimed
at."""


@cache
def timed_forms() -> dict[str, list[dict[str, str]]]:
    """Network -> rows of the table that ``tools/latency.py`` printed."""
    found: dict[str, list[dict[str, str]]] = {}
    head: list[str] = []
    for line in (LOGS / 'latency_vnni.txt').read_text().splitlines():
        cells = [cell.strip() for cell in line.split('|')[1:-1]]
        if line.startswith('$'):
            lines = found.setdefault(TIMED[line.split()[3]], [])
        elif line.startswith('| runtime'):
            head = cells
        elif cells and not cells[0].startswith('-'):
            lines.append(dict(zip(head, cells, strict=True)))
    return found


def speed_up(network: str, form: tuple[str, str]) -> str:
    """The median of a form of ``latency``, as the command printed it."""
    (row,) = (
        row
        for row in timed_forms()[network]
        if (row['runtime'], row['form']) == form
    )
    return row['speed-up'].split()[0]


def latency() -> str:
    """Forms on a processor with VNNI."""
    lines = [
        [network, row['runtime'], row['form'], row['integer'],
         *(row[name].replace('-', ' to ') for name in ('ms', 'speed-up'))]
        for network, found in timed_forms().items()
        for row in found
    ]  # fmt: skip
    head = ['network', 'runtime', 'form', 'layers in integer kernels', 'ms',
            'speed-up over the float file']  # fmt: skip
    return table(head, lines, 'lllrrr')


def latency_aims() -> str:
    """What an int8 file was to gain, and what it gains."""
    lines = [
        [network, f'{aim:.1f}', *(speed_up(network, form) for form in
                                  (RESIDUAL, BEST))]
        for network, aim in FORM_AIMS.items()
    ]  # fmt: skip
    head = ['network', 'aim', 'ONNX Runtime, `--residual int8`',
            'OpenVINO, `--weights int8`']  # fmt: skip
    return table(head, lines, 'lrrr')


def mobile() -> str:
    """Bits of phones, beside the float network that was trained on."""
    folder = LOGS / 'fmnist_mobile_bits'
    runs = by_arm(collect(folder))['floatcont']
    start = {seed: run['float_final'] for seed, run in runs.items()}
    lines = [
        [
            'float, at the start',
            spread(list(start.values())),
            without_wins(paired(start, finals(folder)['floatcont'])),
        ],
        *arm_rows(folder, MOBILE, 'floatcont', wins=False),
    ]
    head = ['network', 'top-1', 'difference to float trained on']
    return table(head, lines)


EXPORTED = {
    'r8_w2a2': 'ResNet-8 W2A2, LSQ',
    'r8_w2a8': 'ResNet-8 W2A8, LSQ',
    'r8_w4a4': 'ResNet-8 W4A4, LSQ',
    'r8_lsqplus_w4a4': 'ResNet-8 W4A4, LSQ+, first and last layer at 8 bits',
    'r8_dorefa_w3a3': 'ResNet-8 W3A3, DoReFa weights, PACT',
    'r20_w2a2': 'ResNet-20 W2A2, LSQ',
    'r20_w4a4': 'ResNet-20 W4A4, LSQ',
}
"""Records -> network for digits."""
IMAGENET = {
    'r18_w4a4': 'ResNet-18 W4A4',
    'r50_w4a4': 'ResNet-50 W4A4',
    'mbv2_w4a4': 'MobileNetV2 W4A4',
    'deits_w4a4': 'DeiT-S W4A4',
}
"""Records -> network for ImageNet, with random weights."""


def report_of(name: str, form: str) -> dict:
    """The ``report.json`` of an export."""
    return json.loads((LOGS / f'exports/{name}-{form}.json').read_text())


def exports(networks: dict[str, str], *forms: str) -> str:
    """The reports of exports of these networks, in these forms."""
    lines = []
    for name, network in networks.items():
        for form in forms:
            report = report_of(name, form)
            model = 'model.tflite' if 'tflite' in report else 'model.onnx'
            types = report['tflite' if 'tflite' in report else 'onnx']
            containers = sorted(set(types['containers'].values()))
            found, sizes = report['agreement'][model], report['sizes']
            other = found['rounded'] + found['unexplained']
            same = logits = ''
            if found['largest_logit']:  # else they say nothing
                same = f'{found["same_class"]} of {found["images"]}'
                part = found['max_difference'] / found['largest_logit']
                logits = f'{part:.1e}'
            lines.append(
                [
                    network,
                    form,
                    ', '.join(containers).upper(),
                    f'{sizes[model]:,}',
                    f'{found["codes"]:,}',
                    f'{found["ties"]:,}',
                    f'{other:,}',
                    same,
                    logits,
                ]
            )
    head = ['network', 'form', 'weights as', 'bytes', 'codes compared',
            'at ties', 'otherwise', 'same class', 'logits']  # fmt: skip
    return table(head, lines, 'lllrrrrrr')


def residual_sums() -> str:
    """What residual sums in 8 bits change."""
    lines = []
    for name, network in EXPORTED.items():
        if name in ('r20_w2a2', 'r20_w4a4'):
            found = report_of(name, 'residual')['agreement']['model.onnx']
            top1 = (f'{100 * found[of]:.2f}' for of in ('top1_torch', 'top1'))
            same = f'{found["same_class"]} of {found["images"]}'
            lines.append([network, *top1, same])
    head = ['network', 'top-1, PyTorch', 'top-1, `--residual int8`',
            'same class']  # fmt: skip
    return table(head, lines, 'lrrr')


def exported_bytes() -> str:
    """The files of exported networks, beside the bits of their tensors."""
    networks = {
        'r20_w2a2': 'digits ResNet-20 W2A2',
        'r20_w4a4': 'digits ResNet-20 W4A4',
        **IMAGENET,
    }
    lines = []
    for name, network in networks.items():
        sizes = report_of(name, 'typed')['sizes']
        bits, packed = sizes['sum_of_bits'], sizes['packed.safetensors']
        lines.append(
            [
                network,
                f'{sizes["float"]:,}',
                f'{bits:,}',
                f'{packed:,} (+{packed / bits - 1:.1%})',
                f'{sizes["model.onnx"]:,}',
                f'{report_of(name, "int8")["sizes"]["model.onnx"]:,}',
            ]
        )
    head = ['network', 'float', 'at its bits', 'packed.safetensors',
            'model.onnx, typed', 'int8']  # fmt: skip
    return table(head, lines, 'lrrrrr')


TABLES = {
    'latency-vnni': latency,
    'latency-aims': latency_aims,
    'formats-resnet20': partial(formats, 'r20'),
    'formats-resnet18': partial(formats, 'r18'),
    'mobile-bits': mobile,
    'exports-onnx': partial(exports, EXPORTED, 'typed', 'int8'),
    'exports-imagenet': partial(exports, IMAGENET, 'typed', 'int8'),
    'exports-bytes': exported_bytes,
    'exports-residual': residual_sums,
    'exports-qonnx': partial(exports, EXPORTED, 'qonnx'),
    'exports-litert': partial(exports, EXPORTED, 'tflite'),
}
