"""Checkpoints of a network at another resolution."""

import pytest
import torch
from mmpretrain.registry import MODELS

from mmauxq.errors import UsageError
from mmauxq.network.checkpoint import check_architecture
from tests.networks import joint_qat

ARCH = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)


def vit(size, **backbone):
    return dict(
        type='ImageClassifier',
        backbone=dict(
            type='VisionTransformer',
            arch=ARCH,
            img_size=size,
            patch_size=8,
            **backbone,
        ),
        head=dict(
            type='VisionTransformerClsHead', num_classes=10, in_channels=16
        ),
        _scope_='mmpretrain',
    )


def test_entries_are_resized_as_by_mmpretrain(tmp_path):
    small, large = vit(32), vit(48)
    torch.manual_seed(0)
    state = MODELS.build(small).state_dict()
    alone = MODELS.build(large)
    alone.load_state_dict(dict(state), strict=False)
    torch.save(state, tmp_path / 'float.pth')
    size = large['backbone']['img_size']
    model = joint_qat(
        architecture=large,
        guidance=None,
        input_shape=(3, size, size),
        float_checkpoint=str(tmp_path / 'float.pth'),
    )
    expected = dict(alone.named_parameters())
    for name, parameter in model.architecture.named_parameters():
        if '_quantizer' not in name:
            assert torch.equal(parameter, expected[name]), name


def swin_v2(window):
    return dict(
        type='ImageClassifier',
        backbone=dict(
            type='SwinTransformerV2',
            arch=dict(
                embed_dims=8,
                depths=[1, 1, 1, 1],
                num_heads=[1, 1, 1, 1],
                extra_norm_every_n_blocks=0,
            ),
            img_size=64,
            window_size=window,
        ),
        head=dict(type='LinearClsHead', num_classes=10, in_channels=64),
        _scope_='mmpretrain',
    )


@pytest.mark.parametrize('window', [4, 8])
def test_entries_that_modules_make_anew(window):
    """SwinTransformerV2 drops the tables of its windows as it loads."""
    state = MODELS.build(swin_v2(4)).state_dict()
    table = 'backbone.stages.0.blocks.0.attn.w_msa.relative_coords_table'
    assert table in state
    network = MODELS.build(swin_v2(window))
    expected = network.state_dict()[table].clone()
    for given in (state, {k: v for k, v in state.items() if k != table}):
        found = check_architecture(network, given, 'it')
        network.load_state_dict(found, strict=False)
        assert torch.equal(network.state_dict()[table], expected)
        weight = 'backbone.patch_embed.projection.weight'
        assert torch.equal(network.state_dict()[weight], state[weight])


def test_another_architecture_is_still_refused():
    state = MODELS.build(vit(32)).state_dict()
    network = MODELS.build(vit(48))
    state['backbone.layers.0.ln1.weight'] = torch.ones(7)
    with pytest.raises(UsageError, match=r'ln1\.weight: expected shape \(16'):
        check_architecture(network, state, 'it')


def test_checking_leaves_network_and_state_alone():
    network = MODELS.build(vit(48))
    state = MODELS.build(vit(32)).state_dict()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    shapes = {k: v.shape for k, v in state.items()}
    check_architecture(network, state, 'it')
    assert {k: v.shape for k, v in state.items()} == shapes
    after = network.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
