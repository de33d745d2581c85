"""To hooks, constructors and tools a JointQAT is the classifier inside."""

import pytest
import torch
from mmpretrain.engine import SwitchRecipeHook
from torch.nn.functional import cross_entropy

from mmauxq.errors import UsageError
from mmauxq.network.profile import floating
from tests.networks import batch, joint_qat


class Runner:
    """As much of a runner as the hook looks at."""

    def __init__(self, model):
        self.model = model


def test_parts_and_features_are_those_of_the_classifier():
    model = joint_qat()
    inner = model.architecture
    assert model.backbone is inner.backbone and model.head is inner.head
    assert model.neck is inner.neck and model.with_neck and model.with_head
    model.loss(*batch())
    model.eval()
    inputs, _ = batch()
    for stage in ('backbone', 'neck'):
        (ours,), (its,) = (
            m.extract_feat(inputs, stage=stage) for m in (model, inner)
        )
        assert torch.equal(ours, its)


def test_parts_are_no_parameters_of_their_own():
    names = [name for name, _ in joint_qat().named_parameters()]
    assert all(n.startswith(('architecture.', 'guidance.')) for n in names)


def test_depths_of_parameters():
    vit = dict(
        type='VisionTransformer',
        arch=dict(
            embed_dims=8, num_layers=2, num_heads=1, feedforward_channels=8
        ),
        img_size=8,
        patch_size=4,
        in_channels=1,
    )
    head = dict(type='VisionTransformerClsHead', num_classes=10, in_channels=8)
    model = joint_qat(
        architecture=dict(type='ImageClassifier', backbone=vit, head=head)
    )
    depths = {
        name: model.get_layer_depth(name)
        for name, _ in model.named_parameters()
    }
    assert depths['architecture.backbone.cls_token'] == (0, 4)
    quantizer = 'architecture.backbone.layers.1.attn.qkv.weight_quantizer.step'
    assert depths[quantizer] == (2, 4)
    assert depths['architecture.head.layers.head.weight'] == (3, 4)
    assert depths['guidance.head.fc.weight'] == (3, 4)
    with pytest.raises(NotImplementedError):  # so does the classifier
        joint_qat().get_layer_depth('architecture.head.fc.weight')


@pytest.mark.parametrize(
    'kind', ['AuxAdaptorAggregator', 'IntermediateClassifiers']
)
def test_a_hook_exchanges_the_loss_of_all_classifiers(kind):
    model = joint_qat(guidance=dict(type=f'mmauxq.{kind}'))
    inputs, samples = batch()
    model.loss(inputs, samples)
    recorded = []
    task = model.guidance.losses

    def losses(output, *rest):
        recorded.append(output)
        return task(output, *rest)

    model.guidance.losses = losses
    smooth = dict(type='LabelSmoothLoss', label_smooth_val=0.5, num_classes=10)
    hook = SwitchRecipeHook([dict(action_epoch=1, loss=smooth)])
    hook._switch_loss(Runner(model), hook.schedule[1]['loss'])
    found = model.loss(inputs, samples)
    target = torch.cat([sample.gt_label for sample in samples])
    logits = recorded[0] if recorded[0].dim() == 3 else recorded[0][None]
    assert len(logits) >= 1
    expected = [cross_entropy(x, target, label_smoothing=0.5) for x in logits]
    given = [v for k, v in found.items() if k.startswith('guidance.loss')]
    torch.testing.assert_close(given, expected)


def test_features_before_training_are_those_in_floating_point():
    """As a tool asks for them that counts multiply-adds."""
    model = joint_qat().eval()
    inputs, _ = batch()
    (found,) = model.extract_feat(inputs)
    with floating(model.architecture):
        (expected,) = model.architecture.extract_feat(inputs)
    assert torch.equal(found, expected)
    with pytest.raises(UsageError, match='never calibrated'):
        model(inputs)  # but it is not evaluated like that
