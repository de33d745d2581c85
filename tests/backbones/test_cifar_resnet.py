import pytest
import torch
from torch import nn

from mmauxq.backbones import CIFARResNet
from mmauxq.errors import UsageError


def weight_layers(network):
    """3 x 3 convolutions; projections of shortcuts are not counted."""
    return [
        m
        for m in network.modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]


def test_depth_counts_the_weight_layers_and_the_classifier():
    assert len(weight_layers(CIFARResNet(20))) + 1 == 20


@pytest.mark.parametrize(
    'depth, millions',
    [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)],
)
def test_size_is_that_of_the_paper(depth, millions):
    """He et al., table 6, with the classifier.

    The paper's shortcuts have no weights; the two projections here are not
    counted.
    """
    network = CIFARResNet(depth)
    count = sum(
        p.numel()
        for name, p in network.named_parameters()
        if 'downsample' not in name
    )
    classifier = 64 * 10 + 10
    digits = 1 if depth == 110 else 2
    assert round((count + classifier) / 1e6, digits) == millions


@pytest.mark.parametrize(
    'channels, base, size', [(3, 16, 32), (1, 8, 28), (1, 4, 8)]
)
def test_shape_of_the_features(channels, base, size):
    network = CIFARResNet(8, in_channels=channels, base_channels=base)
    (out,) = network(torch.randn(2, channels, size, size))
    assert out.shape == (2, 4 * base, size // 4, size // 4)


def test_three_stages_of_equal_length():
    network = CIFARResNet(32)
    assert [len(getattr(network, name)) for name in network.res_layers] == [
        5,
        5,
        5,
    ]


@pytest.mark.parametrize('depth', [18, 21, '20', None])
def test_bad_depth(depth):
    with pytest.raises(UsageError) as error:
        CIFARResNet(depth)
    assert str(error.value) == (
        'CIFARResNet: depth: expected one of 8, 14, 20, 32, 44, 56, 110, got '
        f'{depth!r}'
    )


def test_without_skip_connections():
    """Each block is its two convolutions, and nothing is added."""
    network = CIFARResNet(8, in_channels=1, base_channels=4, skip=False)
    assert not any('downsample' in n for n, _ in network.named_parameters())
    network.eval()
    x = torch.randn(2, 1, 8, 8)
    expected = network.relu(network.norm1(network.conv1(x)))
    for stage in ('layer1', 'layer2', 'layer3'):
        (block,) = getattr(network, stage)
        expected = block.bn1(block.conv1(expected)).relu()
        expected = block.bn2(block.conv2(expected)).relu()
    (out,) = network(x)
    torch.testing.assert_close(out, expected)
    # the table of the class is as it was
    assert CIFARResNet(8).layer2[0].downsample is not None
