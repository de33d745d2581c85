"""The full-precision auxiliary module H."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.registry import MODELS

from .base import Guidance
from .taps import Tap


def conv_bn(
    in_channels: int, out_channels: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """1x1 convolution + batch norm, full precision."""
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            out_channels,
            1,
            stride=stride,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(out_channels),
    )


class Adaptor(BaseModule):
    """One step of the aggregator: ``g_p = ReLU(phi(O_p) + project(g))``.

    The first one, on the stem's output, is ``g_0 = phi(O_0)``.

    Args:
        tap: The block output O_p, (C, H, W).
        previous: Shape of g_{p-1}, (C', H', W'); ``None`` for the first.
        width: Channels of g_p.
        groups: Groups of the convolution phi.
    """

    def __init__(
        self,
        tap: Tap,
        previous: tuple[int, ...] | None,
        width: int,
        groups: int,
    ) -> None:
        super().__init__()
        channels, height, _ = tap.shape
        self.phi = conv_bn(channels, width, groups=groups)
        self.project: nn.Module | None = None
        if previous is not None:
            # blocks round an odd size up (padding) or down (pooling)
            stride = max(round(previous[1] / height), 1)
            self.project = nn.Identity()
            if stride > 1 or previous[0] != width:
                self.project = conv_bn(previous[0], width, stride)

    def forward(self, output: Tensor, g: Tensor | None) -> Tensor:
        """O_p (N, C, H, W) and g_{p-1} to g_p (N, width, H, W)."""
        adapted = self.phi(output)
        if g is None or self.project is None:
            return adapted
        g = self.project(g)
        if g.shape[-2:] != adapted.shape[-2:]:
            g = F.adaptive_avg_pool2d(g, adapted.shape[-2:])
        return F.relu(adapted + g)


INIT = (
    dict(type='Kaiming', layer='Conv2d', mode='fan_out', nonlinearity='relu'),
    dict(type='Constant', layer='BatchNorm2d', val=1),
)


@MODELS.register_module()
class AuxAdaptorAggregator(Guidance):
    """The auxiliary module: adaptors, an aggregator, a classifier of its own.

    ::

        g_0 = phi_0(stem's output)
        g_p = ReLU(phi_p(O_p) + project(g_{p-1}))             p = 1..P
        loss_aux = loss_weight * L(classifier(pool(g_P)), targets)

    phi_p is a 1x1 convolution and a batch norm, ``project`` is the identity
    where the shape stays and a strided 1x1 convolution and a batch norm where
    it changes; all in full precision. The gradient of its loss reaches every
    tapped block along a path without quantizers.

    Source: Zhuang et al., Training Quantized Neural Networks with a
    Full-precision Auxiliary Module, CVPR 2020, arXiv:1903.11236.

    Args:
        taps: What is read from F, the stem's output first.
        head: The head of F; its loss module is used here too.
        num_classes: K.
        loss_weight: Weight of the auxiliary loss.
        width_ratio: Channels of g_p over those of O_p, in (0, 1]. 1 is the
            paper's; narrower ones make each adaptor a bottleneck and cost
            about that much less.
        groups: Groups of the convolutions phi; they must divide the channels
            of every tapped block and of every g_p.
        dtype: ``'float32'`` computes the module in full precision also under
            automatic mixed precision; ``None`` lets autocast decide.
        init_cfg: As of any BaseModule; by default that of mmpretrain's
            ResNet.

    Raises:
        UsageError: If an argument is out of its range, or a tap is no feature
            map.
    """

    uses_stem = True

    def __init__(
        self,
        taps: Sequence[Tap],
        head: nn.Module,
        num_classes: int,
        loss_weight: float = 1.0,
        width_ratio: float = 1.0,
        groups: int = 1,
        dtype: str | None = 'float32',
        init_cfg: dict | Sequence[dict] = INIT,
    ) -> None:
        super().__init__(taps, head, num_classes, loss_weight, list(init_cfg))
        if (
            isinstance(width_ratio, bool)
            or not isinstance(width_ratio, (int, float))
            or not 0 < width_ratio <= 1
        ):
            raise UsageError(
                f'guidance.width_ratio={width_ratio!r}; allowed '
                'are numbers above 0, up to 1'
            )
        if dtype not in ('float32', None):
            raise UsageError(
                f"guidance.dtype={dtype!r}; allowed are 'float32' and None"
            )
        if (
            isinstance(groups, bool)
            or not isinstance(groups, int)
            or groups < 1
        ):
            raise UsageError(
                f'guidance.groups={groups!r}; allowed are integers from 1'
            )
        self.dtype = dtype
        self.names = [tap.name for tap in taps]
        self.shapes = [tap.shape for tap in taps]
        self.adaptors = nn.ModuleList()
        previous: tuple[int, ...] | None = None
        for tap in taps:
            if len(tap.shape) != 3:
                raise UsageError(
                    f'taps: {tap.name} gives shape {tap.shape} '
                    'per sample; AuxAdaptorAggregator takes '
                    'feature maps (C, H, W)'
                )
            width = max(round(tap.shape[0] * width_ratio), 1)
            if tap.shape[0] % groups or width % groups:
                raise UsageError(
                    f'guidance.groups={groups} does not divide the '
                    f'{tap.shape[0]} channels of {tap.name} and the {width} '
                    'of its adaptor'
                )
            self.adaptors.append(Adaptor(tap, previous, width, groups))
            previous = (width, *tap.shape[1:])
        self.head = MMPRETRAIN_MODELS.build(
            dict(
                type='LinearClsHead',
                num_classes=num_classes,
                in_channels=width,
                _scope_='mmpretrain',
            )
        )
        # same kind of loss as F's, but not the same module: it may have state
        self.head.loss_module = copy.deepcopy(head.loss_module)

    def forward(self, outputs: dict[str, Tensor]) -> Tensor:
        """Logits of the auxiliary classifier, (N, K)."""
        first = next(iter(outputs.values()))
        with (
            torch.autocast(first.device.type, enabled=False)
            if (self.dtype)
            else torch.autocast(
                first.device.type,
                enabled=torch.is_autocast_enabled(first.device.type),
            )
        ):
            g = None
            for name, adaptor in zip(self.names, self.adaptors, strict=True):
                output = outputs[name]
                g = adaptor(output.float() if self.dtype else output, g)
            return self.head((F.adaptive_avg_pool2d(g, 1).flatten(1),))

    def loss(self, outputs: dict[str, Tensor], data_samples: list) -> dict:
        """``loss_aux``, weighted. See :meth:`Guidance.loss`."""
        losses = self.head._get_loss(self(outputs), data_samples)
        return dict(loss_aux=losses['loss'] * self.loss_weight)
