"""The three-stage residual networks for small images."""

from typing import Any

from mmpretrain.models.backbones.resnet import BasicBlock
from mmpretrain.models.backbones.resnet_cifar import ResNet_CIFAR
from torch import Tensor

from mmauxq.errors import UsageError
from mmauxq.registry import MODELS


class PlainBlock(BasicBlock):
    """A basic block without its skip connection, otherwise the same."""

    def __init__(self, *args: Any, downsample: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', H', W')."""
        x = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(x)))


@MODELS.register_module()
class CIFARResNet(ResNet_CIFAR):
    """ResNet with 6n + 2 layers in three stages of n basic blocks.

    mmpretrain's ``ResNet_CIFAR`` has the four stages and the widths of the
    ImageNet networks; this one is the network of the paper's CIFAR-10
    section.

    Source: He et al., Deep Residual Learning for Image Recognition,
    arXiv:1512.03385, section 4.2.

    Args:
        depth: 8, 14, 20, 32, 44, 56 or 110.
        in_channels: Of the image.
        base_channels: Width of the first stage; the others have 2 and 4
            times as many.
        skip: Whether the blocks have skip connections; without, it is the
            paper's "plain network".
        **kwargs: Of mmpretrain's ``ResNet_CIFAR``.
    """

    arch_settings = {
        depth: (BasicBlock, ((depth - 2) // 6,) * 3)
        for depth in (8, 14, 20, 32, 44, 56, 110)
    }

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        base_channels: int = 16,
        skip: bool = True,
        **kwargs: Any,
    ) -> None:
        if depth not in self.arch_settings:
            raise UsageError(
                'CIFARResNet: depth: expected one of '
                f'{", ".join(map(str, self.arch_settings))}, got {depth!r}'
            )
        if not skip:
            # on this network; the class's table stays as it is
            _, blocks = self.arch_settings[depth]
            self.arch_settings = {depth: (PlainBlock, blocks)}
            # a last batch norm of zero would stop everything
            kwargs['zero_init_residual'] = False
        super().__init__(
            depth=depth,
            in_channels=in_channels,
            stem_channels=base_channels,
            base_channels=base_channels,
            num_stages=3,
            strides=(1, 2, 2),
            dilations=(1, 1, 1),
            out_indices=(2,),
            **kwargs,
        )
