"""How hooks are tried."""

from .checks import checkpoint_has, epochs_are
from .part import NOT_FOR, TEST, TRAIN, Part

EMA = "dict(type='{}.EMAHook', momentum=0.1)"
SEARCH = """dict(type='RFSearchHook', mode='search', config=dict(
    search=dict(step=0, max_step=3, search_interval=1, exp_rate=0.5,
                init_alphas=0.01, mmin=1, mmax=24, num_branches=2,
                skip_layer=[])))"""
SWITCH = "dict(type='SwitchRecipeHook', schedule=[dict(action_epoch=2, {})])"
FLIP = """train_pipeline=[
    dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=1.0),
    dict(type='PackInputs')]"""
ARCFACE = """
architecture['head'] = dict(
    type='ArcFaceClsHead', num_classes=3, in_channels=16,
    loss=dict(type='CrossEntropyLoss'))
"""
WARMUP = """dict(
    type='WarmupParamHook', param_name='loss_weight',
    module_name='head.loss_module', warmup_epochs=1)"""
TTA_HOOK = """dict(
    type='PrepareTTAHook', tta_cfg=dict(type='AverageClsScoreTTA'))"""
AUGMENTED = """
test_dataloader = dict(val_dataloader, dataset=dict(test_data, pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)],
        [dict(type='PackInputs')]])]))
"""
SWAV = """dict(
    type='SwAVHook', batch_size=4, epoch_queue_starts=1,
    crops_for_assign=[0, 1], feat_dim=16, queue_length=16)"""


def hook(name: str, settings: str, before: str = '', **how) -> Part:
    text = f'{before}\ncustom_hooks = [{settings}]\n'
    return Part(f'HOOKS/{name}', text, **how)


def default_hook(name: str, settings: str, **how) -> Part:
    return Part(
        f'HOOKS/mmengine.{name}', f'\ndefault_hooks = {settings}\n', **how
    )


PARTS = (
    hook('mmpretrain.ClassNumCheckHook', "dict(type='ClassNumCheckHook')",
         data='images', commands=(TRAIN, TEST)),
    hook('mmpretrain.ClassNumCheckHook wrong',
         "dict(type='ClassNumCheckHook')",
         "architecture['head']['num_classes'] = 4", data='images',
         expect='mmpretrain', because='num_classes'),
    hook('mmpretrain.DenseCLHook', "dict(type='DenseCLHook')",
         expect=NOT_FOR, because='loss_lambda',
         why='for DenseCL, a self-supervised model'),
    hook('mmpretrain.EMAHook', EMA.format('mmpretrain'),
         commands=(TRAIN, TEST), check=checkpoint_has('ema_state_dict')),
    hook('mmpretrain.PreciseBNHook',
         "dict(type='PreciseBNHook', num_samples=8, interval=1)",
         says='Running Precise BN'),
    hook('mmpretrain.PrepareProtoBeforeValLoopHook',
         "dict(type='PrepareProtoBeforeValLoopHook')",
         why='without effect, for retrieval'),
    hook('mmpretrain.SetAdaptiveMarginsHook',
         "dict(type='SetAdaptiveMarginsHook')", ARCFACE, data='images'),
    hook('mmpretrain.SimSiamHook',
         "dict(type='SimSiamHook', fix_pred_lr=True, lr=0.05)",
         why='without effect, for SimSiam'),
    hook('mmpretrain.SwAVHook', SWAV, why='without effect, for SwAV'),
    hook('mmpretrain.SwitchRecipeHook loss',
         SWITCH.format("loss=dict(type='LabelSmoothLoss', "
                       "label_smooth_val=0.1, mode='original')"),
         says='Switch loss at epoch 2'),
    hook('mmpretrain.SwitchRecipeHook batch augments',
         SWITCH.format("batch_augments=dict(augments="
                       "dict(type='Mixup', alpha=0.2))"),
         says='Switch batch augments at epoch 2'),
    hook('mmpretrain.SwitchRecipeHook pipeline', SWITCH.format(FLIP),
         data='images', says='Switch train pipeline at epoch 2'),
    hook('mmpretrain.VisualizationHook',
         "dict(type='VisualizationHook', enable=True, interval=1, "
         "out_dir='drawn')",
         data='images', commands=(TRAIN, TEST), leaves='drawn/*.png'),
    # the weight is 0 in the first step
    hook('mmpretrain.WarmupParamHook', WARMUP,
         'default_hooks = dict(logger=dict(interval=1))',
         says=r'\[1\]\[1/3\] .*student.loss: 0\.0000'),
    default_hook('CheckpointHook',
                 "dict(checkpoint=dict(save_best='accuracy/top1'))",
                 leaves='run/best_accuracy_top1_*.pth'),
    default_hook('DistSamplerSeedHook',
                 "dict(sampler_seed=dict(type='DistSamplerSeedHook'))"),
    hook('mmengine.EMAHook', EMA.format('mmengine'),
         commands=(TRAIN, TEST), check=checkpoint_has('ema_state_dict')),
    hook('mmengine.EarlyStoppingHook',
         "dict(type='EarlyStoppingHook', monitor='accuracy/top1', "
         'patience=1, min_delta=101)',
         'train_cfg["max_epochs"] = 4', says='the monitored metric did not',
         check=epochs_are(2)),
    hook('mmengine.EmptyCacheHook',
         "dict(type='EmptyCacheHook', before_epoch=True, after_iter=True)"),
    default_hook('IterTimerHook', "dict(timer=dict(type='IterTimerHook'))",
                 says='data_time: '),
    default_hook('LoggerHook',
                 "dict(logger=dict(type='LoggerHook', interval=1))",
                 says=r'Epoch\(train\) \[1\]\[1/3\]'),
    hook('mmengine.NPUProfilerHook', "dict(type='NPUProfilerHook')",
         expect='needs', because='torch_npu', why='torch_npu'),
    hook('mmengine.NaiveVisualizationHook',
         "dict(type='NaiveVisualizationHook')", data='images'),
    hook('mmengine.NaiveVisualizationHook in a test',
         "dict(type='NaiveVisualizationHook')", data='images',
         commands=(TRAIN, TEST), expect='mmpretrain',
         because='string indices must be integers'),
    default_hook('ParamSchedulerHook',
                 "dict(param_scheduler=dict(type='ParamSchedulerHook'))\n"
                 "param_scheduler = dict(type='StepLR', step_size=1)",
                 says='lr: 1.0000e-03'),
    hook('mmengine.PrepareTTAHook', TTA_HOOK, AUGMENTED, data='images',
         own=True, commands=(TRAIN, TEST), says='accuracy/top1: '),
    hook('mmengine.ProfilerHook',
         "dict(type='ProfilerHook', by_epoch=False, profile_times=2, "
         "json_trace_path='trace.json')", leaves='trace.json'),
    hook('mmengine.RFSearchHook', SEARCH, leaves='run/local_search_*.json',
         why='without effect, only detectors of MMDetection start a search'),
    default_hook('RuntimeInfoHook',
                 "dict(runtime_info=dict(type='RuntimeInfoHook'))",
                 says='student.loss: '),
    hook('mmengine.SyncBuffersHook', "dict(type='SyncBuffersHook')",
         commands=('bash {root}/tools/dist_train.sh config.py 2 '
                   '--work-dir run',)),
)  # fmt: skip
