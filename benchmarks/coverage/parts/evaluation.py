"""How evaluators, metrics and visualizers are tried."""

from .part import NOT_FOR, TEST, TRAIN, Part

FULL = dict(commands=(TRAIN, TEST))
TASKS = """
architecture['head'] = dict(
    type='MultiTaskHead', in_channels=16, task_heads=dict(
        first=dict(type='LinearClsHead', num_classes=3),
        second=dict(type='LinearClsHead', num_classes=2)))
data_preprocessor = dict(mean=[127.5] * 3, std=[127.5] * 3)
train_data = dict(
    type='MultiTaskDataset', data_root='../images', ann_file='tasks.json',
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='PackInputs', multi_task_fields=['gt_label'])])
train_dataloader['dataset'] = train_data
val_dataloader['dataset'] = train_data
val_evaluator = dict(type='MultiTasksMetric', task_metrics=dict(
    first=[dict(type='Accuracy')], second=[dict(type='Accuracy')]))
"""
SHAPES = """
architecture['head']['num_classes'] = 1000
data_preprocessor['num_classes'] = 1000
val_evaluator = dict(
    type='ShapeBiasMetric', csv_dir='shapes', model_name='joint')
"""


def metric(name: str, settings: str = '', **how) -> Part:
    kind = name.partition('.')[2]
    text = f"val_evaluator = dict(type='{kind}'{settings})\n"
    return Part(f'METRICS/{name}', text, **{**FULL, **how})


def other_task(kind: str, why: str, because: str, settings='') -> Part:
    return metric(
        f'mmpretrain.{kind}', settings, expect=NOT_FOR, why=why,
        because=because,
    )  # fmt: skip


NUMPY = dict(
    expect='mmpretrain', because="'in1d'",
    why='calls `numpy.in1d`, which NumPy 2.4 has no more',
)  # fmt: skip
QUESTIONS = 'of answers to questions about images'
CAPTIONS = dict(
    expect='needs', because='pycocoevalcap', why='pycocoevalcap, for captions'
)

PARTS = (
    Part('EVALUATORS/mmengine.Evaluator',
         "val_evaluator = dict(type='mmengine.Evaluator', metrics=["
         "dict(type='Accuracy'), dict(type='SingleLabelMetric')])\n",
         **FULL, says='single-label/recall'),
    metric('mmengine.DumpResults', ", out_file_path='results.pkl'",
           leaves='results.pkl'),
    metric('mmpretrain.Accuracy', ', topk=(1, 2)', says='accuracy/top2'),
    metric('mmpretrain.SingleLabelMetric', says='single-label/f1-score'),
    metric('mmpretrain.ConfusionMatrix', says='confusion_matrix/result'),
    metric('mmpretrain.MultiLabelMetric', data='labels',
           says='multi-label/f1-score'),
    metric('mmpretrain.AveragePrecision', data='labels',
           says='multi-label/mAP'),
    metric('mmpretrain.VOCMultiLabelMetric', data='labels',
           says='multi-label/f1-score'),
    metric('mmpretrain.VOCAveragePrecision', data='labels',
           says='multi-label/mAP'),
    Part('METRICS/mmpretrain.MultiTasksMetric', TASKS, data='images',
         **FULL, expect='refused', because='gives logits'),
    Part('METRICS/mmpretrain.ShapeBiasMetric', SHAPES, data='images',
         **FULL, leaves='shapes/*.csv'),
    metric('mmpretrain.RetrievalRecall', ', topk=1', **NUMPY),
    metric('mmpretrain.RetrievalAveragePrecision', ', topk=2', **NUMPY),
    other_task('ANLS', QUESTIONS, "'NoneType' object has no"),
    other_task('VQAAcc', QUESTIONS, "'NoneType' has no len"),
    other_task('GQAAcc', QUESTIONS, "'NoneType' is not iterable"),
    other_task('ReportVQA', QUESTIONS, 'question_id',
               ", file_path='answers.json'"),
    other_task('ScienceQAMetric', QUESTIONS, "'NoneType' has no len"),
    metric('mmpretrain.COCOCaption', ", ann_file='captions.json'",
           **CAPTIONS),
    metric('mmpretrain.NocapsSave', ", save_dir='.'", **CAPTIONS),
    other_task('VisualGroundingMetric', 'of boxes', 'pred_bboxes'),
    Part('VISUALIZERS/mmengine.Visualizer',
         "visualizer = dict(type='mmengine.Visualizer', _delete_=True, "
         "vis_backends=[dict(type='LocalVisBackend')])\n",
         leaves='run/*/vis_data/scalars.json'),
    Part('VISUALIZERS/mmpretrain.UniversalVisualizer',
         "visualizer = dict(type='UniversalVisualizer', "
         "vis_backends=[dict(type='LocalVisBackend')])\n",
         leaves='run/*/vis_data/scalars.json'),
)  # fmt: skip
