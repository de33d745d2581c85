"""The recipes and settings that the words of a measurement's name mean."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = {
    'r18': 'mmpretrain::resnet/resnet18_8xb32_in1k.py',
    'r34': 'mmpretrain::resnet/resnet34_8xb32_in1k.py',
    'r50': 'mmpretrain::resnet/resnet50_8xb32_in1k.py',
    'mbv2': 'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py',
    'deits': 'mmpretrain::deit/deit-small_4xb256_in1k.py',
    'r20': str(ROOT / 'benchmarks/resnet20.py'),  # for --size 32
}
"""Short name of a network -> its config."""

DIGITS = ('r8', 'r20')
"""NETWORK of ``epoch``: those with a recipe for the digits."""

GUIDANCE: dict[str, tuple[str, dict]] = {
    'w4a4': ('qat', {}),
    'aux': ('aux', {}),
    'aux-float32': ('aux', dict(dtype='float32')),
    'aux-quarter': ('aux', dict(width_ratio=0.25)),
    'dsn': ('dsn', {}),
    'kd': ('kd', {}),
}
"""WHAT -> prefix of the fragment, and what changes in its guidance."""

FLOAT_BITS = dict(weight=dict(bits=32), activation=dict(bits=32))
"""``quantizers`` of the recipe at 32 bits, which quantizes nothing."""

RECIPES = {'float': ('qat', {}), **GUIDANCE}
"""The same, with the float network. In a runner and in a recorded step it is
the recipe at 32 bits, with the fused operations of this package."""

PEER = 'mmpretrain'
"""WHAT of ``runner``: MMPretrain's own config, run by MMEngine alone."""

LAUNCHED = dict(cuda_graph=False)
FORMS: dict[str, dict] = {
    'auto': {},
    'eager': LAUNCHED,
    'reference': LAUNCHED,
    'graph': LAUNCHED,
    'codes': dict(LAUNCHED, memory='codes'),
    'recompute': dict(LAUNCHED, memory='recompute'),
    'graphed': dict(cuda_graph=True),
    'graphed-codes': dict(cuda_graph=True, memory='codes'),
    'graphed-recompute': dict(cuda_graph=True, memory='recompute'),
    'chained': LAUNCHED,
    'chained-codes': dict(LAUNCHED, memory='codes'),
    'chained-recompute': dict(LAUNCHED, memory='recompute'),
    'compiled': dict(compile=True),
    'compiled-reference': dict(compile=True),
    'compiled-kernel': dict(compile=True),
    'compiled-codes': dict(compile=True, memory='codes'),
    'compiled-recompute': dict(compile=True, memory='recompute'),
    'compiled-graph': dict(compile=dict(mode='reduce-overhead')),
}
"""FORM of a step -> options of ``model.speed``."""

OPTIONS: dict[str, list[str]] = {
    'plain': [],
    'eager': ['--eager'],
    'launched': ['--cfg-options', 'model.speed.cuda_graph=False'],
    'compiled': ['--compile'],
    'compiled-fused': [
        '--compile',
        '--cfg-options',
        'optim_wrapper.optimizer.fused=True',
    ],  # as the optimizer of a recorded step is
    'graphed': ['--cuda-graph'],
    'graphed-codes': [
        '--cuda-graph',
        '--cfg-options',
        'model.speed.memory=codes',
    ],
    'codes': ['--cfg-options', 'model.speed.memory=codes'],
    'recompute': ['--cfg-options', 'model.speed.memory=recompute'],
    'syncbn': ['--cfg-options', 'sync_bn=torch'],
}
"""FORM of a run -> arguments of ``tools/train.py``."""

DECODERS = [
    'opencv', 'opencv-stacked', 'opencv-half', 'opencv-quarter', 'pillow',
    'torchvision', 'turbojpeg', 'dali-cpu', 'torchvision-gpu', 'dali',
]  # fmt: skip
"""What may decode in ``loader``; the first is what MMPretrain has."""

LOADED = """
images = dict(
    type='mmauxq.GeneratedImages', length={length}, shape=(3, {size}, {size}))
train_dataloader = dict(
    _delete_=True, batch_size={batch}, num_workers={workers},
    persistent_workers=True, pin_memory=True, drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True), dataset=images)
"""
IN_MEMORY = """
images = dict(
    type='mmauxq.GeneratedImages', length={length}, shape=(3, {size}, {size}))
train_dataloader = dict(
    _delete_=True, batch_size={batch}, num_workers=0, drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='mmauxq.collated'),
    dataset=dict(type='mmauxq.InMemoryImages', dataset=images, padding=4,
                 flip=0.5))
"""
GENERATED = """\
_base_ = './recipe.py'
{loader}
train_cfg = dict(_delete_=True, by_epoch=True, max_epochs=1)
param_scheduler = []  # those of the recipe may begin later
val_cfg = val_dataloader = val_evaluator = None
test_cfg = test_dataloader = test_evaluator = None
default_hooks = dict(
    checkpoint=dict(interval=-1, save_last=False, save_best=None))
env_cfg = dict(cudnn_benchmark=True, mp_cfg=dict(mp_start_method='fork'))
{model}
{more}"""


def recipe(what: str, network: str) -> str:
    """Text of the recipe of WHAT, and of a key of ``NETWORKS``."""
    if what == PEER:
        return f"_base_ = '{NETWORKS[network]}'\n"
    return (
        f"_base_ = ['{NETWORKS[network]}',\n"
        f"          'mmauxq::_base_/{RECIPES[what][0]}_w4a4.py']\n"
        'model = dict(_delete_=True, architecture=_base_.model,\n'
        '             **_base_.quantization)\n'
    )


def write_config(
    work_dir: Path, network: str, what: str, batch: int, length: int,
    size: int, ranks: int = 1, more: str = '',
) -> Path:  # fmt: skip
    """Write a recipe that runs one epoch on generated images, saving nothing.

    Args:
        work_dir: Folder of the file; made if it does not exist.
        network: A key of ``NETWORKS``.
        what: A key of ``RECIPES``, or ``PEER``.
        batch: Images in a step of a rank.
        length: Number of images, of all ranks together.
        size: Their height and width in pixels.
        ranks: Processes that share the cores of this machine.
        more: Lines at the end of the file.
    """
    model: dict = dict(float_checkpoint=None, input_shape=(3, size, size))
    changes = RECIPES[what][1] if what != PEER else {}
    if changes:
        model['guidance'] = changes
    if what == 'float':
        model['quantizers'] = FLOAT_BITS
    # small images are held in memory, as in the recipes of those networks
    loader = IN_MEMORY if network == 'r20' else LOADED
    text = GENERATED.format(
        loader=loader.format(
            batch=batch, length=length, size=size,
            workers=min(8, max(1, (os.cpu_count() or 2) // (2 * ranks))),
        ),
        model='' if what == PEER else f'model = {model!r}',
        more=more,
    )  # fmt: skip
    work_dir.mkdir(parents=True, exist_ok=True)
    (work_dir / 'recipe.py').write_text(recipe(what, network))
    config = work_dir / 'config.py'
    config.write_text(text)
    return config


def amp() -> list[str]:
    """Arguments of ``tools/train.py`` for bfloat16."""
    import torch

    if torch.cuda.is_available():
        return ['--amp', '--cfg-options', 'optim_wrapper.dtype=bfloat16']
    return ['--amp']
