"""Tables that gather records of other pages: README.md, which_recipe.md."""

from statistics import mean

from docs.figures.gain import FLOAT as FLOAT_NETWORKS
from mmauxq.text import table

from . import map as settings
from . import speed
from .experiments import by_network
from .export import BEST, RESIDUAL, latest_formats, report_of, speed_up
from .records import LOGS, QUARTER, ratio, rows
from .runs import (
    Arm,
    beside,
    difference,
    finals,
    paired,
    top1_by_seed,
    without_wins,
)

NARROW = (
    'experiments.md'
    '#twenty-seeds-of-the-module-on-a-narrow-network-digits-2026-11'
)
AS_LONG = 'experiments.md#the-module-or-more-epochs-digits-2026-11'
ONE_BIT = 'experiments.md#the-module-at-one-bit-digits-2026-11'
TINY = 'experiments.md#one-bit-and-the-whole-width-on-tiny-imagenet-2026-11'
TEACHERS = (
    'experiments.md#a-wider-teacher-and-a-rate-for-each-arm-at-the-whole-'
    'width-tiny-imagenet-2026-11'
)
NARROWER = (
    'experiments.md#a-wide-teacher-of-a-narrow-network-at-two-and-four-bits-'
    'tiny-imagenet-2026-11'
)
MAP = 'map.md#from-a-float-network'
PHONES = 'export.md#bits-of-phones-and-microcontrollers'
FORMATS = 'export.md#formats-and-runtimes'


def recipe_parts(arm: str) -> list[float]:
    """Of a recipe beside the float iteration, one for each host."""
    return [
        found[arm]['ms'] / found[speed.PEER]['ms']
        for found in speed.runner('r18', speed.OWN['r18']).values()
        if {arm, speed.PEER} <= set(found)
    ]


def in_words(parts: list[str]) -> str:
    """Such as ``a, b and c``."""
    return ' and '.join(filter(None, [', '.join(parts[:-1]), parts[-1]]))


def readme() -> str:
    """The results on top of README.md."""
    parts = [f'{part:.2f}' for part in recipe_parts('aux/plain')]
    deep = 'map/fmnist_depth56'
    both = finals(LOGS / deep)['auxkd4']
    r50 = speed.steps('r50', 256)
    of_compiled = ratio(r50['w4a4/graphed']['ms'], r50['float/compiled']['ms'])
    plain = without_wins(difference(LOGS / deep, 'auxkd4', 'plain'))
    wide = 'tiny_teachers', 'kdw4'
    with_wide = top1_by_seed(wide).values()
    over_plain, over_float = (
        without_wins(beside(wide, ('tiny_rates', arm)))
        for arm in ('plain', 'on')
    )
    start = dict.fromkeys(both, FLOAT_NETWORKS[deep])
    report = report_of('r20_w2a2', 'typed')
    sizes, codes = report['sizes'], report['agreement']['model.onnx']
    other = codes['ties'] + codes['rounded'] + codes['unexplained']
    lines = [
        [
            '**speed**: an iteration of `aux_r18_w4a4`, with its module, on '
            f'one H200, {len(parts)} hosts',
            f"{in_words(parts)} of MMPretrain's float iteration; the step of "
            f'ResNet-50 W4A4 takes {of_compiled} of that of compiled float',
        ],
        [
            '**accuracy**: ResNet-56 W2A2 with module and teacher, '
            f'Fashion-MNIST, {len(both)} seeds',
            f'{mean(both.values()):.2f}: {plain} beside plain W2A2, '
            f'{without_wins(paired(both, start))} beside float',
        ],
        [
            '**accuracy**: ResNet-18 W2A2 with a wider teacher, '
            f'Tiny-ImageNet, {len(with_wide)} seeds '
            f'([commands](docs/{TEACHERS}))',
            f'{mean(with_wide):.2f}: {over_plain} beside plain W2A2, '
            f'{over_float} beside float trained on',
        ],
        [
            '**what ships**: ResNet-20 W2A2 for digits, run on '
            f'{codes["images"]} images beside PyTorch',
            f'{sizes["packed.safetensors"]:,} bytes (float: '
            f'{sizes["float"]:,}); {other} of {codes["codes"]:,} codes differ',
        ],
    ]
    return table(['measured', 'result'], lines)


def by_device() -> str:
    """What pays on a device."""
    large, small = latest_formats('r18'), latest_formats('r20')

    def times(arm: str) -> str:
        return f'{large[arm]["speed_up"][1]:.2f} times'

    def part(row: dict) -> str:
        return f'{row["bytes"] / row["float_bytes"]:.0%}'

    without_vnni = f'[ResNet-18 {times("4/4/int8-residual/onnxruntime")}]'
    openvino = f'[ResNet-18 {times("4/4/int8/openvino")}]({FORMATS})'
    lines = [
        [
            'processor with VNNI, ONNX Runtime',
            'W4A4',
            '`qat_*_w4a4`',
            '`--weights int8 --residual int8`',
            f'[ResNet-18 {speed_up("ResNet-18", RESIDUAL)} times]'
            '(export.md#speed) as fast as its float export, ResNet-50 '
            f'{speed_up("ResNet-50", RESIDUAL)} times',
        ],
        [
            'processor with VNNI, OpenVINO',
            'W4A4',
            '`qat_*_w4a4`',
            '`--weights int8`',
            f'[ResNet-18 {speed_up("ResNet-18", BEST)} times]'
            '(export.md#speed), ResNet-50 '
            f'{speed_up("ResNet-50", BEST)} times, with the codes of PyTorch',
        ],
        [
            'processor without VNNI, ONNX Runtime',
            'W4A4',
            '`qat_*_w4a4`',
            '`--weights int8 --residual int8`',
            f'{without_vnni}({FORMATS})',
        ],
        [
            'processor without VNNI, OpenVINO',
            'W4A4',
            '`qat_*_w4a4`',
            '`--weights int8`',
            openvino,
        ],
        [
            'processor with VNNI, vision transformers',
            'W4A4',
            '`qat_*_w4a4`',
            '`--weights int8`',
            '[DeiT-S 2.54 times](export.md#speed) in ONNX Runtime; raw '
            'records were not kept',
        ],
        [
            'phone, LiteRT',
            'W4A8, W2A8',
            '`qat_*_{w4a8,w2a8}`',
            '`--format tflite`',
            'small, not fast: ResNet-20 at W2A8 takes '
            f'[{part(small["2/8/tflite/litert"])}]({FORMATS}) of the float '
            'bytes and '
            f'{1 / small["2/8/tflite/litert"]["speed_up"][1]:.1f} times as '
            'long, on a server processor; no phone was tried',
        ],
        [
            'FPGA: FINN, hls4ml',
            'W2A2 to W4A4',
            '`qat_*_{w2a2,w3a3,w4a4}`',
            '`--format qonnx`',
            '[which readers load it](export.md#qonnx), and where they agree; '
            'no hardware was made',
        ],
        [
            'storage, or a runtime of your own',
            'any',
            'any',
            '`packed.safetensors`',
            f'ResNet-18 takes [{part(large["4/4/packed/torch"])}]({FORMATS}) '
            'of the float bytes at W4A4, '
            f'{part(large["2/2/packed/torch"])} at W2A2',
        ],
        [
            'GPU, at inference', '', '', '',
            'no export is made for it, and none was measured',
        ],
    ]  # fmt: skip
    head = ['device', 'bits', 'recipe', 'export', 'measured']
    return table(head, lines)


BESIDE_FLOAT = (
    ('W8A8', 'ResNet-20 (8-16-32), 8,192 images of Fashion-MNIST',
     'map/fmnist_narrow_bits', 'w8', 'floatcont', MAP),
    ('W4A4', 'ResNet-20, Fashion-MNIST', 'map/fmnist_w4a4', 'plain',
     'floatcont', MAP),
    ('W4A4', 'ResNet-20 (8-16-32), 8,192 images of Fashion-MNIST',
     'map/fmnist_narrow_w4a4', 'plain', 'floatcont', MAP),
    ('W4A4', 'ResNet-18, quarter width, Tiny-ImageNet', QUARTER, 'w4', 'on',
     NARROWER),
    ('W4A16', 'ResNet-20, Fashion-MNIST', 'fmnist_mobile_bits', 'qat-w4a16',
     'floatcont', PHONES),
    ('W4A8', 'ResNet-20, Fashion-MNIST', 'fmnist_mobile_bits', 'qat-w4a8',
     'floatcont', PHONES),
    ('W2A8', 'ResNet-20, Fashion-MNIST', 'fmnist_mobile_bits', 'qat-w2a8',
     'floatcont', PHONES),
    ('W2A2', 'ResNet-18, Tiny-ImageNet', 'tiny_rates', 'plain', 'on',
     TEACHERS),
    ('W2A2', 'ResNet-18, quarter width, Tiny-ImageNet', QUARTER, 'plain',
     'on', NARROWER),
)  # fmt: skip
"""Bits, network, records, arm, that of the float network that was trained on
for as long, and page."""


def by_bits() -> str:
    """What low bits cost, beside a float network."""
    lines = []
    for bits, network, name, arm, on, page in BESIDE_FLOAT:
        found = difference(LOGS / name, arm, on)
        lines.append(
            [bits, network,
             f'[{without_wins(found)}]({page}) beside the float network '
             'trained on', found.pairs]
        )  # fmt: skip
    float_r20 = top1_of('float_r20_fmnist.json')
    low = top1_of('qat_r20_w2a2_fmnist.json')
    deep = list(finals(LOGS / 'map/fmnist_depth56')['plain'].values())
    digits = by_network('digits_w2a2_20_epochs.jsonl')
    small = list(finals(LOGS / 'digits_r8')['plain'].values())
    start = list(by_network('quickstart.jsonl')['float'].values())
    for network, low_bits, float_runs, page in (
        ('ResNet-20, Fashion-MNIST', [low], [float_r20], 'fashion-mnist'),
        ('ResNet-56, Fashion-MNIST', deep,
         [FLOAT_NETWORKS['map/fmnist_depth56']], 'fashion-mnist'),
        ('ResNet-20 (8-16-32), digits',
         list(digits['plain from float'].values()),
         list(digits['float'].values()), 'digits'),
        ('ResNet-8 (8-16-32), digits, 5 epochs', small, start, 'digits'),
    ):  # fmt: skip
        lost = sum(low_bits) / len(low_bits)
        lost -= sum(float_runs) / len(float_runs)
        lines.append(
            ['W2A2', network,
             f'[{lost:+.2f}](results.md#{page}) beside the float network that '
             'it started from', len(low_bits)]
        )  # fmt: skip
    one_bit = finals(LOGS / 'map/fmnist_narrow_w1a1')['plain'].values()
    above = FLOAT_NETWORKS['map/fmnist_narrow_w1a1']
    lines.append(
        ['W1A1', 'ResNet-20 (8-16-32), 8,192 images of Fashion-MNIST',
         f'[{mean(one_bit):.2f} of {above:.2f}]({MAP})', len(one_bit)]
    )  # fmt: skip
    lines.append(['any', 'ImageNet', 'not measured', ''])
    return table(['bits', 'network, data', 'against float', 'seeds'], lines)


def top1_of(name: str) -> float:
    """The last top-1 of a log."""
    return [r for r in rows(name) if 'accuracy/top1' in r][-1]['accuracy/top1']


def by_guidance() -> str:
    """What guidance gains, and what it costs."""

    def iteration(arm: str) -> str:
        parts = recipe_parts(arm)
        return f'[{min(parts):.2f} to {max(parts):.2f}](speed.md)'

    kept = settings.overall('plain', 'fmnist_two_stages')

    def gains(arm: str) -> str:
        gain = kept[arm]
        return (
            f'[{without_wins(gain.difference)}](map.md) over '
            f'{len(gain.effects)} settings: not shown'
        )

    def gain(arm: Arm, plain: Arm, page: str) -> str:
        return f'[{without_wins(beside(arm, plain))}]({page})'

    def in_setting(name: str, arm: str, page: str = MAP) -> str:
        return gain((name, arm), (name, 'plain'), page)

    def of_teacher(arm: str) -> str:
        plain = 'tiny_rates', 'plain'
        return gain(('tiny_teachers', arm), plain, TEACHERS)

    def at_quarter(arm: str, plain: str) -> str:
        return gain((QUARTER, arm), (QUARTER, plain), NARROWER)

    deep, low = 'map/fmnist_depth56', 'map/fmnist_narrow_w1a1'
    lines = [
        [
            'F ends near its float network', '`qat_*`', '',
            f"{iteration('w4a4/plain')} of MMPretrain's float iteration "
            '(ResNet-18 W4A4, one H200)',
        ],
        [
            'the same, with time to spare', '`aux_*`', gains('aux'),
            f'{iteration("aux/plain")} of that float iteration',
        ],
        [
            'the same', '`kd_*`', gains('kd4'),
            f'[{speed.cost_of("kd")}](map.md#what-it-costs) times the plain '
            'step (ResNet-50)',
        ],
        [
            'a deep network, 56 layers at W2A2', '`auxkd_*`, temperature 4',
            f'{in_setting(deep, "auxkd4")}, the clearest of many '
            'comparisons',
            'a module and a teacher together',
        ],
        [
            'F ends far below, W1A1', '`auxkd_*`, temperature 4',
            in_setting(low, 'auxkd4'), 'the same',
        ],
        [
            'the same', '`kd_*`, temperature 4', in_setting(low, 'kd4'),
            f'[{speed.cost_of("kd")}](map.md#what-it-costs) times (ResNet-50)',
        ],
        [
            'the same, 200 classes (Tiny-ImageNet)',
            '`kd_*`, temperature 4',
            f'{of_teacher("kd4")} at W2A2; at temperature 1 '
            f'{in_setting("tiny_rates", "kd", TEACHERS)}, at W1A1 '
            f'{in_setting("tiny_quarter_w1a1", "kd", TINY)}',
            'the same',
        ],
        [
            'the same, and a better network to learn from',
            '`kd_r18_w2a2_tiny_wide_teacher`',
            f'{of_teacher("kdw4")} at W2A2, where the teacher is twice as '
            f'wide; at a quarter of the width {at_quarter("w4wide", "w4")} at '
            f'W4A4, {at_quarter("kdw4", "plain")} at W2A2',
            'a forward pass of the teacher more, which has four times the '
            'multiply-adds of F, and 61 times at a quarter of the width',
        ],
        [
            'a small network that loses much, digits', '`aux_*`',
            f'{in_setting("digits_narrow_seeds", "aux", NARROW)} at '
            f'W2A2, {in_setting("digits_w1a1_seeds", "aux", ONE_BIT)} '
            'at W1A1',
            'the module adds a tenth of the multiply-adds of F; '
            f'[plain training for as long]({AS_LONG}) gains as much',
        ],
        [
            'from scratch, few epochs',
            'plain training at a higher learning rate',
            '[level with guidance](map.md#from-scratch) at the best rates',
            'none',
        ],
        [
            'ResNet-50, and time counts', '`aux_*` with `width_ratio=0.25`',
            f'[no form differs]({MAP}) from a float start',
            f'[{speed.cost_of("aux-quarter")}](map.md#what-it-costs) '
            'times the plain step, the full module '
            f'{speed.cost_of("aux")}',
        ],
    ]  # fmt: skip
    head = ['where you are', 'recipe', 'gain over `qat_*`, paired by seed',
            'a training step']  # fmt: skip
    return table(head, lines)


TABLES = {
    'readme': readme,
    'by-device': by_device,
    'by-bits': by_bits,
    'by-guidance': by_guidance,
}
