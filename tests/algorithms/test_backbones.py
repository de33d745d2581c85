"""Networks of every tensor layout, unknown to this package."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.runner.checkpoint import get_state_dict
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmauxq.algorithms import JointQAT
from mmauxq.layers import QuantLayer
from mmauxq.network.profile import floating
from mmauxq.quantizers import named_quantizers
from tests.networks import AUX, QUANTIZERS, classifier

SIZE = 16


class MapBlock(nn.Module):
    def __init__(self, channels, out=None, stride=1):
        super().__init__()
        self.a = nn.Conv2d(channels, out or channels, 3, stride, 1)
        self.norm = nn.BatchNorm2d(out or channels)
        self.b = nn.Conv2d(out or channels, out or channels, 1)

    def forward(self, x):
        return self.b(F.relu(self.norm(self.a(x))))


class TokenBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attn = nn.MultiheadAttention(channels, 2, batch_first=True)
        self.fc1 = nn.Linear(channels, 2 * channels)
        self.fc2 = nn.Linear(2 * channels, channels)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attn(y, y, y)[0]
        return x + self.fc2(F.gelu(self.fc1(x)))


@MODELS.register_module()
class OwnMaps(BaseModule):
    """(N, C, H, W)"""

    def __init__(self, with_cp=False, depth_drop=0.0, inplace=False):
        super().__init__()
        self.with_cp, self.depth_drop = with_cp, depth_drop
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.stages = nn.ModuleList(
            [
                MapBlock(8),
                MapBlock(8, 12, 2),
                MapBlock(12),
            ]
        )
        self.late = nn.ReLU(inplace=inplace)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            y = (
                checkpoint(stage, x, use_reentrant=False)
                if self.with_cp and x.requires_grad
                else stage(x)
            )
            if self.depth_drop and self.training and y.shape == x.shape:
                keep = torch.rand(len(x), 1, 1, 1) > self.depth_drop
                y = x + y * keep
            # in place, it overwrites the output of the block
            x = self.late(y)
        return (x,)


@MODELS.register_module()
class OwnChannelsLast(BaseModule):
    """(N, H, W, C)"""

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.a = nn.Linear(channels, channels)
            self.b = nn.Linear(channels, channels)

        def forward(self, x):
            return x + self.b(F.gelu(self.a(x)))

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, 4)
        self.layers = nn.ModuleList([self.Block(12) for _ in range(2)])

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = layer(x)
        return (x.permute(0, 3, 1, 2),)


@MODELS.register_module()
class OwnTokens(BaseModule):
    """(N, L, C), with a class token"""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layers = nn.ModuleList([TokenBlock(8) for _ in range(2)])

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return (x[:, 0],)


@MODELS.register_module()
class OwnMergedTokens(BaseModule):
    """((N, L, C), (H, W)), merged on the way, in stages that are no list"""

    class Stage(nn.Module):
        def __init__(self, channels, merge):
            super().__init__()
            self.merge = nn.Linear(4 * channels // 2, channels)
            self.merges = merge
            self.blocks = nn.ModuleList(
                [TokenBlock(channels) for _ in range(2)]
            )

        def forward(self, x, size):
            if self.merges:
                x = x.transpose(1, 2).unflatten(2, size)
                x = F.pixel_unshuffle(x, 2)
                size = tuple(x.shape[-2:])
                x = self.merge(x.flatten(2).transpose(1, 2))
            for block in self.blocks:
                x = block(x)
            return x, size

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.stages = nn.ModuleList(
            [self.Stage(8, False), self.Stage(16, True)]
        )

    def forward(self, x):
        x = self.patch(x)
        size = tuple(x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)
        for stage in self.stages:
            x, size = stage(x, size)
        return (x.mean(1),)


@MODELS.register_module()
class OwnBranches(BaseModule):
    """[(N, C, H, W), (N, 2 C, H / 2, W / 2)]"""

    class Fuse(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine = nn.Conv2d(8, 8, 3, 1, 1)
            self.down = nn.Conv2d(8, 16, 3, 2, 1)
            self.coarse = nn.Conv2d(16, 16, 3, 1, 1)

        def forward(self, branches):
            fine, coarse = branches
            return [
                F.relu(self.fine(fine)),
                F.relu(self.down(fine) + self.coarse(coarse)),
            ]

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.split = nn.Conv2d(8, 16, 3, 2, 1)
        self.stages = nn.ModuleList([self.Fuse() for _ in range(2)])

    def forward(self, x):
        x = F.relu(self.stem(x))
        branches = [x, F.relu(self.split(x))]
        for stage in self.stages:
            branches = stage(branches)
        return (branches[1],)


@MODELS.register_module()
class OwnReader(BaseModule):
    """Tokens, by layers that are never called"""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 8, bias=False)
            self.out = nn.Linear(8, 8)

        def forward(self, x):
            return x + self.out(F.gelu(F.linear(x, self.qkv.weight)))

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.layers = nn.ModuleList([self.Block() for _ in range(2)])

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return (x.mean(1),)


LAYOUTS = {
    'OwnMaps': (12, ['map'] * 4, 6),
    'OwnChannelsLast': (12, ['channels_last'] * 3, 4),
    'OwnTokens': (8, ['tokens'] * 3, 8),
    'OwnMergedTokens': (16, ['tokens'] * 5, 17),
    'OwnBranches': (16, ['map'] * 6, 7),
    'OwnReader': (8, ['tokens'] * 3, 4),
}


def algorithm(kind, guidance=AUX, seed=0, **backbone):
    torch.manual_seed(seed)
    width = LAYOUTS[kind][0]
    maps = kind in ('OwnMaps', 'OwnChannelsLast', 'OwnBranches')
    model = JointQAT(
        architecture=dict(
            type='ImageClassifier',
            backbone=dict(type=kind, **backbone),
            neck=dict(type='GlobalAveragePooling') if maps else None,
            head=dict(type='LinearClsHead', num_classes=5, in_channels=width),
        ),
        quantizers=QUANTIZERS,
        guidance=guidance,
        input_shape=(3, SIZE, SIZE),
    )
    model.init_weights()
    return model


def batch():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 3, SIZE, SIZE, generator=generator)
    return inputs, [DataSample().set_gt_label(i) for i in range(4)]


@pytest.mark.parametrize('kind', LAYOUTS)
def test_taps_have_the_right_layout(kind):
    model = algorithm(kind)
    assert [tap.layout for tap in model.taps] == LAYOUTS[kind][1]
    assert model.taps[0].name.startswith('stem')


@pytest.mark.parametrize('kind', LAYOUTS)
def test_all_layers_are_quantized(kind):
    model = algorithm(kind)
    kept = {
        name: bits.reason for name, bits in model.bits.items() if bits.is_float
    }
    # the first stage of merged tokens has a layer that it does not use
    kept.pop('backbone.stages.0.merge', None)
    assert sorted(kept.values()) == ['classifier', 'first layer']
    # the first quantized layers of merged tokens are those of its blocks
    expected = LAYOUTS[kind][2]
    assert sum(not bits.is_float for bits in model.bits.values()) == expected
    assert expected == sum(
        isinstance(m, QuantLayer) for m in model.architecture.modules()
    )


@pytest.mark.parametrize('kind', LAYOUTS)
def test_guidance_alone_reaches_the_first_quantized_layer(kind):
    model = algorithm(kind)
    model.train()
    losses = model(*batch(), mode='loss')
    assert all(torch.isfinite(loss) for loss in losses.values())
    losses['guidance.loss_aux'].backward()
    name = next(n for n, bits in model.bits.items() if not bits.is_float)
    layer = model.architecture.get_submodule(name)
    assert layer.product_weight.grad.abs().sum() > 0
    for name, quantizer in named_quantizers(model.architecture):
        assert quantizer.calibrated, name


@pytest.mark.parametrize('kind', LAYOUTS)
def test_the_guidance_can_be_dropped(kind):
    model, plain = algorithm(kind), algorithm(kind, None, seed=1)
    model.loss(*batch())
    plain.load_state_dict(model.state_dict())
    model.eval(), plain.eval()
    inputs, _ = batch()
    assert torch.equal(
        model(inputs, mode='tensor'), plain(inputs, mode='tensor')
    )


@pytest.mark.parametrize('kind', LAYOUTS)
def test_the_conversion_alone_changes_nothing(kind):
    """With quantizers that pass on what they get."""
    torch.manual_seed(0)
    model = algorithm(kind).eval()
    network = MODELS.build(dict(type=kind, _scope_='mmpretrain')).eval()
    state = model.architecture.backbone.state_dict()
    network.load_state_dict(
        {k: v for k, v in state.items() if '_quantizer.' not in k}
    )
    inputs, _ = batch()
    with torch.no_grad(), floating(model):
        found = model.architecture.backbone(inputs)[0]
        torch.testing.assert_close(found, network(inputs)[0])


def guidance_gradient(**backbone):
    model = algorithm('OwnMaps', **backbone)
    model.train()
    torch.manual_seed(3)
    model.loss(*batch())['guidance.loss_aux'].backward()
    return model.architecture.backbone.stages[0].a.weight.grad


def test_activation_checkpointing_sends_the_same_gradient():
    torch.testing.assert_close(
        guidance_gradient(with_cp=True), guidance_gradient()
    )


def test_activations_in_place_send_the_same_gradient():
    torch.testing.assert_close(
        guidance_gradient(inplace=True), guidance_gradient()
    )


def test_stochastic_depth_does_not_silence_the_taps():
    assert guidance_gradient(depth_drop=0.9).abs().sum() > 0


@pytest.mark.filterwarnings('ignore:In MMCV:UserWarning')
@pytest.mark.parametrize(
    'backbone, width, layouts',
    [
        (dict(type='MobileNetV3', arch='small_050'), None, {'map'}),
        (
            dict(
                type='VisionTransformer',
                arch='deit-tiny',
                img_size=32,
                patch_size=16,
            ),
            192,
            {'tokens'},
        ),
        (
            dict(
                type='SwinTransformer',
                arch=dict(embed_dims=24, depths=[2, 2], num_heads=[2, 4]),
                img_size=56,
                window_size=7,
                out_indices=(1,),
            ),
            48,
            {'tokens'},
        ),
        (
            dict(
                type='SwinTransformerV2',
                arch=dict(
                    embed_dims=24,
                    depths=[2, 2],
                    num_heads=[2, 4],
                    extra_norm_every_n_blocks=0,
                ),
                img_size=64,
                window_size=8,
                out_indices=(1,),
            ),
            48,
            {'tokens'},
        ),
    ],
    ids=lambda value: value.get('type') if isinstance(value, dict) else '',
)
def test_families_of_mmpretrain(backbone, width, layouts):
    maps = width != 192
    model = JointQAT(
        architecture=dict(
            type='ImageClassifier',
            backbone=backbone,
            neck=dict(type='GlobalAveragePooling') if maps else None,
            head=dict(
                type='LinearClsHead', num_classes=4, in_channels=width or 288
            ),
        ),
        quantizers=QUANTIZERS,
        guidance=AUX,
        input_shape=None if width else (3, 32, 32),
    )
    kept = [b.reason for b in model.bits.values() if b.is_float]
    assert kept == ['first layer', 'classifier']
    assert {tap.layout for tap in model.taps} == layouts
    shape = model.cost.shape
    samples = [DataSample().set_gt_label(i) for i in range(2)]
    losses = model(torch.randn(2, *shape), samples, mode='loss')
    losses['guidance.loss_aux'].backward()
    name = next(n for n, bits in model.bits.items() if not bits.is_float)
    weight = model.architecture.get_submodule(name).product_weight
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize('where', ['loss', 'forward'])
def test_a_head_that_declines_to_train_learns_the_targets(where):
    """LeViT and EfficientFormer, without a teacher."""
    model = algorithm('OwnMaps')
    head = model.architecture.head
    plain = head.forward

    def decline(*args, **kwargs):
        if where == 'loss' or head.training:
            raise NotImplementedError
        return plain(*args, **kwargs)

    expected = model.loss(*batch())['student.loss']
    setattr(head, where, decline)
    torch.testing.assert_close(model.loss(*batch())['student.loss'], expected)
    assert head.training


def test_a_head_that_gives_several_logits():
    """Conformer's has a loss for two; the module's classifier gives one."""
    torch.manual_seed(0)
    sizes = dict(embed_dims=16, depths=3, num_heads=2, channel_ratio=1)
    loss = dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')
    model = JointQAT(
        architecture=dict(
            type='ImageClassifier',
            backbone=dict(type='Conformer', arch=sizes, base_channels=16),
            head=dict(
                type='ConformerHead',
                num_classes=4,
                in_channels=[64, 16],
                loss=loss,
            ),
        ),
        quantizers=QUANTIZERS,
        guidance=AUX,
        input_shape=(3, 32, 32),
    )
    given = []
    model.guidance.register_forward_hook(lambda *call: given.append(call[-1]))
    model.architecture.head.register_forward_hook(
        lambda *call: given.extend(call[-1])
    )
    samples = [DataSample().set_gt_label(i) for i in range(3)]
    losses = model.train()(torch.randn(3, 3, 32, 32), samples, mode='loss')
    *own, aux = (
        F.cross_entropy(x, torch.arange(3), label_smoothing=0.1)
        for x in given[-3:]
    )
    assert [tuple(x.shape) for x in given[-3:]] == [(3, 4)] * 3
    torch.testing.assert_close(losses['student.loss'], sum(own))
    torch.testing.assert_close(losses['guidance.loss_aux'], aux)


def test_scales_are_trained_in_a_frozen_backbone():
    """As in mmpretrain's linear evaluation of self-supervised networks."""
    model = JointQAT(
        architecture=classifier(frozen_stages=3),
        quantizers=QUANTIZERS,
        guidance=AUX,
        input_shape=(1, 8, 8),
    )
    model.train()
    assert not model.architecture.backbone.layer1[0].conv1.weight.requires_grad
    samples = [DataSample().set_gt_label(i) for i in range(4)]
    losses = model(torch.randn(4, 1, 8, 8), samples, mode='loss')
    losses['guidance.loss_aux'].backward()
    for name, quantizer in named_quantizers(model.architecture):
        assert quantizer.step.grad is not None, name


@pytest.mark.filterwarnings('ignore:In MMCV:UserWarning')
@pytest.mark.parametrize('state_dict', [get_state_dict, nn.Module.state_dict])
def test_a_checkpoint_holds_what_the_backbone_would_leave_out(state_dict):
    """MMPretrain's LoRA saves its low-rank weights only."""

    def lora(seed):
        torch.manual_seed(seed)
        model = JointQAT(
            architecture=dict(
                type='ImageClassifier',
                backbone=dict(
                    type='LoRAModel',
                    module=dict(
                        type='VisionTransformer',
                        arch='deit-tiny',
                        img_size=32,
                        patch_size=16,
                    ),
                    alpha=16,
                    rank=2,
                    targets=[dict(type='qkv')],
                ),
                neck=None,
                head=dict(
                    type='VisionTransformerClsHead',
                    num_classes=4,
                    in_channels=192,
                ),
            ),
            quantizers=QUANTIZERS,
            guidance=AUX,
        )
        model.init_weights()
        return model

    model, again = lora(0), lora(1)
    inputs = torch.randn(2, 3, 32, 32)
    samples = [DataSample().set_gt_label(i) for i in range(2)]
    model(inputs, samples, mode='loss')
    state = state_dict(model)
    everything = [name for name, _ in model.named_parameters()]
    assert not set(everything) - set(state)
    again.load_state_dict(state)
    model.eval(), again.eval()
    assert torch.equal(
        model(inputs, mode='tensor'), again(inputs, mode='tensor')
    )
