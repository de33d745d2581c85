"""How optimizers, their wrappers and constructors, schedulers, loops, runners
and model wrappers are tried."""

from .checks import scales_spared, setting_moved
from .part import NOT_FOR, TEST, TRAIN, Part

DECAYED = """
optim_wrapper['constructor'] = 'LearningRateDecayOptimWrapperConstructor'
optim_wrapper['paramwise_cfg'] = dict(
    layer_decay_rate=0.5, norm_decay_mult=0.0)
"""
ITERATIONS = """
train_cfg = dict(type='IterBasedTrainLoop', max_iters=6, val_interval=3)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=3))
log_processor = dict(by_epoch=False)
"""
STRATEGY = """
runner_type = 'FlexibleRunner'
strategy = dict(type='{}Strategy')
"""
NEEDS_COLOSSALAI = dict(
    expect='needs', because='(?i)install.*colossalai', why='colossalai'
)
NEEDS_DEEPSPEED = dict(
    expect='needs', because='(?i)deepspeed.*install|install.*deepspeed',
    why='deepspeed',
)  # fmt: skip
TWO_RANKS = ('bash {root}/tools/dist_train.sh config.py 2 --work-dir run',)
FULL = dict(commands=(TRAIN, TEST))


def optimizer(name: str, settings: str = ', weight_decay=1e-4', **how) -> Part:
    kind = name.partition('.')[2]
    section = f'dict(type={kind!r}, lr=1e-3{settings})'
    text = f"optim_wrapper['optimizer'] = {section}\n"
    if 'weight_decay' in settings:
        how.setdefault('check', scales_spared)
    return Part(f'OPTIMIZERS/{name}', text, **how)


def wrapper(name: str, settings: str = '', **how) -> Part:
    text = f"optim_wrapper['type'] = {name!r}\n{settings}\n"
    return Part(f'OPTIM_WRAPPERS/mmengine.{name}', text, **how)


def loop(name: str, section: str, more: str = '', **how) -> Part:
    kind = name.partition('.')[2]
    return Part(
        f'LOOPS/{name}', f'{section}["type"] = {kind!r}\n{more}', **how
    )


def parallel(name: str, **how) -> Part:
    text = f"model_wrapper_cfg = dict(type='{name}')\n"
    return Part(
        f'MODEL_WRAPPERS/mmengine.{name}', text, commands=TWO_RANKS, **how
    )


def strategy(name: str, kind: str, **how) -> Part:
    text = (
        f"{STRATEGY.format(kind)}strategy['model_wrapper'] = "
        f"dict(type='{name}')\n"
    )
    return Part(f'MODEL_WRAPPERS/mmengine.{name}', text, **how)


SCHEDULES = dict(
    Constant='factor=0.5, end=9',
    CosineAnnealing='T_max=3',
    CosineRestart='periods=[3], restart_weights=[1], eta_min=0.0',
    Exponential='gamma=0.5',
    Linear='start_factor=0.5, end=9',
    MultiStep='milestones=[1]',
    OneCycle='eta_max=0.5, total_steps=6, by_epoch=False',
    Poly='end=3',
    ReduceOnPlateau="monitor='accuracy/top1', rule='greater', patience=0, "
    'threshold=1000.0, factor=0.5',
    Step='step_size=1',
)


MONITORS = ('ReduceOnPlateau',)
LONGER = "train_cfg['max_epochs'] = 4\n"
"""A plateau is seen when an epoch is compared with one before it."""


def schedulers() -> list[Part]:
    parts = []
    for kind, settings in SCHEDULES.items():
        for suffix, what in (
            ('ParamScheduler', 'lr'), ('LR', 'lr'), ('Momentum', 'momentum')
        ):  # fmt: skip
            if (kind, suffix) == ('OneCycle', 'Momentum'):
                continue  # MMEngine has none
            if suffix == 'ParamScheduler':
                settings_of = f"param_name='lr', {settings}"
            else:
                settings_of = settings
            parts.append(
                Part(
                    f'PARAM_SCHEDULERS/mmengine.{kind}{suffix}',
                    f"param_scheduler = [dict(type='{kind}{suffix}', "
                    f'{settings_of})]\n' + LONGER * (kind in MONITORS),
                    check=setting_moved(what),
                )
            )
    weight_decay = Part(
        'PARAM_SCHEDULERS/mmpretrain.CosineAnnealingWeightDecay',
        "param_scheduler = [dict(type='CosineAnnealingWeightDecay', "
        'T_max=3, eta_min=1e-5)]\n',
        check=setting_moved('weight_decay'),
    )
    return [*parts, weight_decay]


PARTS = (
    Part('OPTIM_WRAPPER_CONSTRUCTORS/'
         'mmpretrain.LearningRateDecayOptimWrapperConstructor',
         DECAYED, network='vit', check=scales_spared),
    Part('OPTIM_WRAPPER_CONSTRUCTORS/mmengine.DefaultOptimWrapperConstructor',
         "optim_wrapper['constructor'] = 'DefaultOptimWrapperConstructor'\n"
         "optim_wrapper['paramwise_cfg'] = dict(norm_decay_mult=0.0, "
         "custom_keys={'backbone.conv1': dict(lr_mult=0.1)})\n",
         check=scales_spared),
    wrapper('OptimWrapper', "optim_wrapper['accumulative_counts'] = 2\n"
            "optim_wrapper['clip_grad'] = dict(max_norm=1.0)",
            check=scales_spared),
    wrapper('AmpOptimWrapper', check=scales_spared),
    wrapper('ApexOptimWrapper', expect='needs', because='Apex is not inst',
            why='apex'),
    wrapper('ColossalAIOptimWrapper', STRATEGY.format('ColossalAI'),
            **NEEDS_COLOSSALAI),
    wrapper('DeepSpeedOptimWrapper', STRATEGY.format('DeepSpeed'),
            **NEEDS_DEEPSPEED),
    optimizer('mmengine.ASGD'),
    optimizer('mmengine.Adadelta'),
    optimizer('mmengine.Adagrad'),
    optimizer('mmengine.Adam'),
    optimizer('mmengine.AdamW'),
    optimizer('mmengine.Adamax'),
    optimizer('mmengine.LBFGS', '', expect='mmpretrain', because='closure'),
    optimizer('mmengine.Muon', expect='mmpretrain', because='2D'),
    optimizer('mmengine.NAdam'),
    optimizer('mmengine.Optimizer', expect='mmpretrain',
              because="keyword argument 'lr'", why='the base of all others'),
    optimizer('mmengine.RAdam'),
    optimizer('mmengine.RMSprop'),
    optimizer('mmengine.Rprop', ''),
    optimizer('mmengine.SGD', ', momentum=0.9, weight_decay=1e-4'),
    optimizer('mmengine.SparseAdam', '', expect='mmpretrain',
              because='dense gradients'),
    optimizer('mmengine.TorchAdafactor'),
    optimizer('mmengine.ZeroRedundancyOptimizer',
              ", optimizer_type='Adam', weight_decay=1e-4",
              commands=TWO_RANKS, check=None, expect='refused',
              because='got ZeroRedundancyOptimizer'),
    optimizer('mmpretrain.Adan'),
    optimizer('mmpretrain.LARS', ', momentum=0.9, weight_decay=1e-4'),
    optimizer('mmpretrain.Lamb'),
    *schedulers(),
    loop('mmengine.EpochBasedTrainLoop', 'train_cfg',
         'train_cfg.pop("by_epoch")\n'),
    Part('LOOPS/mmengine.IterBasedTrainLoop', ITERATIONS,
         leaves='run/iter_6.pth'),
    loop('mmengine.ValLoop', 'val_cfg'),
    loop('mmengine.TestLoop', 'test_cfg', **FULL),
    loop('mmpretrain.RetrievalValLoop', 'val_cfg', expect=NOT_FOR,
         because='tensors used as indices',
         why='for retrieval of images and texts'),
    loop('mmpretrain.RetrievalTestLoop', 'test_cfg', **FULL, expect=NOT_FOR,
         because='tensors used as indices',
         why='for retrieval of images and texts'),
    Part('RUNNERS/mmengine.Runner', "runner_type = 'Runner'\n", **FULL),
    Part('RUNNERS/mmengine.FlexibleRunner',
         "runner_type = 'FlexibleRunner'\n", **FULL),
    parallel('MMDistributedDataParallel'),
    parallel('DistributedDataParallel', expect='mmpretrain',
             because="no attribute 'train_step'"),
    parallel('DataParallel', expect='mmpretrain',
             because="no attribute 'train_step'"),
    parallel('MMSeparateDistributedDataParallel', expect=NOT_FOR,
             because="'MMDistributedDataParallel' object is not iterable",
             why='for models of several optimizers'),
    parallel('MMFullyShardedDataParallel', expect='needs',
             because='needs a non-CPU accelerator', why='an accelerator'),
    strategy('ColossalAIModelWrapper', 'ColossalAI', **NEEDS_COLOSSALAI),
    strategy('CollosalAIModelWrapper', 'ColossalAI', **NEEDS_COLOSSALAI),
    strategy('MMDeepSpeedEngineWrapper', 'DeepSpeed', **NEEDS_DEEPSPEED),
    Part('LOG_PROCESSORS/mmengine.LogProcessor',
         "log_processor = dict(type='LogProcessor', window_size=1, "
         'num_digits=6)\n', says=r'loss: \d+\.\d{6}'),
    *(Part(f'BATCH_AUGMENTS/mmpretrain.{kind}',
           'architecture["train_cfg"] = dict(augments='
           f"dict(type='{kind}', alpha=1.0))\n")
      for kind in ('Mixup', 'CutMix', 'ResizeMix')),
    Part('DATA_SAMPLERS/mmengine.DefaultSampler',
         "train_dataloader['sampler'] = dict(type='DefaultSampler', "
         'shuffle=True, round_up=False)\n'),
    Part('DATA_SAMPLERS/mmengine.InfiniteSampler',
         "train_dataloader['sampler'] = dict(type='InfiniteSampler')\n"
         + ITERATIONS, leaves='run/iter_6.pth'),
    Part('DATA_SAMPLERS/mmpretrain.RepeatAugSampler',
         "train_dataloader['sampler'] = dict(type='RepeatAugSampler')\n"),
    Part('DATA_SAMPLERS/mmpretrain.SequentialSampler',
         "val_dataloader['sampler'] = dict(type='SequentialSampler')\n"),
)  # fmt: skip
