"""How MMPretrain's own tools and inferencer are tried.

They do not call :func:`mmauxq.compat.enable`. They find a trained network.
"""

from .part import Part

CONVERTERS = frozenset(
    'tools/model_converters/' + name
    for name in (
        'clip_to_mmpretrain.py', 'convnext_to_mmpretrain.py',
        'davit_to_mmpretrain.py', 'deit3_to_mmpretrain.py',
        'edgenext_to_mmpretrain.py', 'efficientnet_to_mmpretrain.py',
        'efficientnetv2_to_mmpretrain.py', 'eva02_to_mmpretrain.py',
        'eva_to_mmpretrain.py', 'glip_to_mmpretrain.py',
        'hornet2mmpretrain.py', 'levit2mmpretrain.py', 'llava-delta2mmpre.py',
        'mixmim_to_mmpretrain.py', 'mlpmixer_to_mmpretrain.py',
        'mobilenetv2_to_mmpretrain.py', 'ofa.py',
        'openai-clip_to_mmpretrain-clip.py', 'otter2mmpre.py',
        'ram2mmpretrain.py', 'replknet_to_mmpretrain.py',
        'repvgg_to_mmpretrain.py', 'revvit_to_mmpretrain.py',
        'shufflenetv2_to_mmpretrain.py', 'tinyvit_to_mmpretrain.py',
        'torchvision_to_mmpretrain.py', 'twins2mmpretrain.py',
        'van2mmpretrain.py', 'vgg_to_mmpretrain.py', 'vig_to_mmpretrain.py',
    )
)  # fmt: skip
OTHERS = frozenset(
    (
        'tools/analysis_tools/utils.py',
        'tools/dataset_converters/convert_flickr30k_ann.py',
        'tools/dataset_converters/convert_imagenet_subsets.py',
        'tools/dataset_converters/convert_inaturalist.py',
        'tools/torchserve/mmpretrain_handler.py',
    )
)
"""Tools that read neither a config nor a checkpoint of a classifier: weights
of other projects, data sets, and modules of other tools."""

DUMP = '{python} {tools}/test.py config.py run/slim.pth --out run/results.pkl'
INFER = """{python} -c "
from mmpretrain import ImageClassificationInferencer as Inferencer
ask = Inferencer('config.py', pretrained='run/slim.pth', device='cpu')
print('class', ask('../images/a/0.png')[0]['pred_class'])" """


def tool(path: str, arguments: str, *before: str, **how) -> Part:
    name, _, word = path.partition(' ')
    command = f'{{python}} {{tools}}/{name} {arguments}'
    more = dict(data='images', shared=True) | how
    return Part(f'tools/{path}', commands=(*before, command), **more)


PARTS = (
    tool('train.py', 'config.py --work-dir run --no-persistent-workers',
         shared=False, leaves='run/epoch_2.pth'),
    tool('test.py', 'config.py run/slim.pth', says='accuracy/top1: '),
    tool('test.py checkpoint', 'config.py run/epoch_2.pth',
         says='accuracy/top1: '),
    tool('test.py --tta', 'config.py run/slim.pth --tta',
         says='accuracy/top1: '),
    tool('kfold-cross-valid.py',
         'config.py --num-splits 2 --work-dir folds '
         '--no-persistent-workers', shared=False,
         leaves='folds/fold1/epoch_2.pth'),
    tool('analysis_tools/analyze_logs.py cal_train_time',
         'cal_train_time run/*/vis_data/scalars.json',
         says='average iter time'),
    tool('analysis_tools/analyze_results.py',
         'config.py run/results.pkl --out-dir shown --topk 2', DUMP,
         leaves='shown/*/*.png'),
    tool('analysis_tools/confusion_matrix.py',
         'config.py run/slim.pth --show-path matrix.png --include-values',
         leaves='matrix.png'),
    tool('analysis_tools/eval_metric.py',
         'run/results.pkl --metric type=Accuracy topk=1,2', DUMP,
         says='accuracy/top2'),
    tool('analysis_tools/get_flops.py', 'config.py --shape 8 8',
         says='Flops'),
    tool('analysis_tools/shape_bias.py',
         '--csv-dir shapes --result-dir shapes --model-names joint',
         expect='needs', because="'pandas'", why='pandas'),
    tool('misc/print_config.py', 'config.py', says='mmauxq.JointQAT'),
    tool('misc/verify_dataset.py', 'config.py --out-path broken.log',
         says='no broken file'),
    tool('model_converters/publish_model.py',
         'run/slim.pth published.pth', leaves='published*.pth'),
    tool('model_converters/publish_model.py checkpoint',
         'run/epoch_2.pth published_full.pth', leaves='published_full*.pth'),
    tool('model_converters/merge_lora_weight.py',
         'config.py run/slim.pth merged.pth', why='without effect, for LoRA'),
    tool('model_converters/reparameterize_model.py',
         'config.py run/slim.pth deployed.pth', expect='refused',
         because='must be a `mmpretrain.classifiers.ImageClassifier`',
         why='merges branches, which have quantizers of their own'),
    tool('torchserve/mmpretrain2torchserve.py',
         'config.py run/slim.pth --output-folder served', expect='needs',
         because='torch-model-archiver', why='torch-model-archiver'),
    tool('torchserve/test_torchserver.py',
         '../images/a/0.png config.py run/slim.pth joint', expect='needs',
         because="'requests'", why='requests, and a running TorchServe'),
    tool('visualization/browse_dataset.py',
         'config.py --output-dir browsed --not-show', expect='mmpretrain',
         because="argument '_scope_'",
         why='the tool does not take a visualizer that is inherited by '
         '`mmpretrain::`'),
    tool('visualization/browse_dataset.py own visualizer',
         'config.py --output-dir browsed --not-show', shared=False,
         settings='visualizer = dict(_delete_=True, '
         "type='UniversalVisualizer', "
         "vis_backends=[dict(type='LocalVisBackend')])\n",
         expect='mmpretrain', because="argument: 'renderer'",
         why='not ported to Matplotlib 3.11'),
    tool('visualization/vis_cam.py',
         '../images/a/0.png config.py run/slim.pth --save-path cam.png',
         leaves='cam.png', expect='needs', because='grad-cam',
         why='grad-cam below 1.5'),
    tool('visualization/vis_scheduler.py',
         'config.py --not-show --save-path schedule.png', shared=False,
         settings="param_scheduler = [dict(type='StepLR', step_size=1)]\n",
         leaves='schedule.png'),
    tool('visualization/vis_tsne.py',
         'config.py --checkpoint run/slim.pth --work-dir tsne --n-iter 250 '
         '--perplexity 3', expect='mmpretrain', because="'n_iter'",
         why='scikit-learn 1.7 has no `n_iter` any more; the features of the '
         'network are computed'),
    Part('tools/ImageClassificationInferencer', data='images', shared=True,
         commands=(INFER,), says=r'class [abc]'),
)  # fmt: skip
