"""The full-precision auxiliary module H."""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmpretrain.models import MultiLabelClsHead
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.registry import MODELS

from .base import Guidance
from .taps import CHANNELS_LAST, MAP, TOKENS, Tap


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


def linear_norm(in_channels: int, out_channels: int) -> nn.Sequential:
    """Linear layer + layer norm, full precision: the same for tokens."""
    return nn.Sequential(
        nn.Linear(in_channels, out_channels, bias=False),
        nn.LayerNorm(out_channels),
    )


def extra_tokens(count: int) -> int:
    """How many of ``count`` tokens stand before those of a square image.

    Class and distillation tokens do; 0 if that leaves no square.
    """
    extra = count - math.isqrt(count) ** 2
    return extra if extra <= 2 else 0


def to_map(tokens: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """(N, L, C) to (N, C, H, W), without the extra tokens.

    Args:
        tokens: Of a square image, else they become one row.
        size: (H, W) if it is known.
    """
    tokens = tokens[:, extra_tokens(tokens.shape[1]) :].transpose(1, 2)
    if size is not None and size[0] * size[1] == tokens.shape[2]:
        return tokens.unflatten(2, tuple(size))
    side = math.isqrt(tokens.shape[2])
    if side * side != tokens.shape[2]:
        side = 1
    return tokens.unflatten(2, (side, -1))


def resize_tokens(tokens: Tensor, count: int) -> Tensor:
    """(N, L, C) to (N, count, C): pooled as an image if both are square.

    Extra tokens are carried along; missing ones start as the mean.
    """
    if tokens.shape[1] == count:
        return tokens
    extra, wanted = extra_tokens(tokens.shape[1]), extra_tokens(count)
    side = math.isqrt(count - wanted)
    image = to_map(tokens)
    size = (
        (side, side) if side * side == count - wanted else (1, count - wanted)
    )
    if size[0] > 1 and image.shape[-2] == 1:
        size = (1, count - wanted)
    if size[0] == 1:
        image = image.flatten(2).unsqueeze(2)
    pooled = F.adaptive_avg_pool2d(image, size).flatten(2).transpose(1, 2)
    first = tokens[:, : min(extra, wanted)]
    missing = wanted - first.shape[1]
    mean = pooled.mean(1, keepdim=True).expand(-1, missing, -1)
    return torch.cat([first, mean, pooled], 1)


class Adaptor(BaseModule):
    """One step of the aggregator: ``g_p = ReLU(phi(O_p) + project(g))``.

    The first one, on the stem's output, is ``g_0 = phi(O_0)``. A block that
    gives several tensors has a ``phi`` for each, and their sum, at the
    smallest of the sizes, is adapted.

    Args:
        taps: The block output O_p; several if the block gives several.
        previous: What g_{p-1} looks like, ``None`` for the first.
        width_ratio: Channels of g_p over those of O_p.
        groups: Groups of the convolutions phi.

    Attributes:
        result: What g_p looks like: its layout, a map or tokens, and shape.
    """

    def __init__(
        self,
        taps: Sequence[Tap],
        previous: Tap | None,
        width_ratio: float,
        groups: int,
    ) -> None:
        super().__init__()
        plain = [_canonical(tap) for tap in taps]
        maps = [tap for tap in plain if tap.layout == MAP]
        # the deepest: smallest, and then widest
        main = min(
            maps or plain,
            key=lambda tap: (
                _positions(tap),
                -_channels(tap),
            ),
        )
        width = max(round(_channels(main) * width_ratio), 1)
        self.layouts = [tap.layout for tap in taps]
        phi = [self._phi(tap, plain, width, groups) for tap in taps]
        self.phi = phi[0] if len(phi) == 1 else nn.ModuleList(phi)
        self.result = Tap(
            main.name,
            (width, *main.shape[1:])
            if main.layout == MAP
            else (main.shape[0], width),
            main.layout,
        )
        self.project: nn.Module | None = None
        if previous is None:
            return
        self.project = nn.Identity()
        if main.layout == MAP:
            # blocks round an odd size up (padding) or down (pooling)
            stride = 1
            if previous.layout == MAP:
                stride = max(round(previous.shape[1] / main.shape[1]), 1)
            if stride > 1 or _channels(previous) != width:
                self.project = conv_bn(_channels(previous), width, stride)
        elif _channels(previous) != width or _positions(
            previous
        ) != _positions(main):
            self.project = linear_norm(_channels(previous), width)

    def _phi(
        self, tap: Tap, taps: Sequence[Tap], width: int, groups: int
    ) -> nn.Sequential:
        channels = _channels(_canonical(tap))
        if tap.layout == TOKENS:
            if groups > 1:
                raise UsageError(
                    f'guidance.groups={groups}: {tap.name} gives tokens, '
                    'which are adapted by linear layers; allowed is 1'
                )
            return linear_norm(channels, width)
        if channels % groups or width % groups:
            raise UsageError(
                f'guidance.groups={groups} does not divide the '
                f'{channels} channels of {tap.name} and the {width} '
                'of its adaptor'
            )
        return conv_bn(channels, width, groups=groups)

    def _adapt(self, outputs: Sequence[Tensor]) -> Tensor:
        phi = [self.phi] if len(self.layouts) == 1 else self.phi
        adapted = [
            module(x.permute(0, 3, 1, 2) if layout == CHANNELS_LAST else x)
            for module, layout, x in zip(
                phi, self.layouts, outputs, strict=True
            )
        ]
        if len(adapted) == 1:
            return adapted[0]
        if self.result.layout == MAP:
            maps = [x for x in adapted if x.dim() == 4]
            size = min((x.shape[-2:] for x in maps), key=math.prod)
            adapted = [
                F.adaptive_avg_pool2d(x if x.dim() == 4 else to_map(x), size)
                for x in adapted
            ]
        else:
            count = min(x.shape[1] for x in adapted)
            adapted = [resize_tokens(x, count) for x in adapted]
        return sum(adapted[1:], adapted[0])

    def forward(self, outputs: Sequence[Tensor], g: Tensor | None) -> Tensor:
        """O_p and g_{p-1} to g_p: (N, width, H, W) or (N, L, width)."""
        adapted = self._adapt(outputs)
        if g is None or self.project is None:
            return adapted
        if adapted.dim() == 4:
            if g.dim() == 3:
                g = to_map(g, adapted.shape[-2:])
            g = self.project(g)
            if g.shape[-2:] != adapted.shape[-2:]:
                g = F.adaptive_avg_pool2d(g, adapted.shape[-2:])
        else:
            if g.dim() == 4:
                g = g.flatten(2).transpose(1, 2)
            g = resize_tokens(self.project(g), adapted.shape[1])
        return F.relu(adapted + g)


def _canonical(tap: Tap) -> Tap:
    """The same with a channels-last map as a map."""
    if tap.layout != CHANNELS_LAST:
        return tap
    height, width, channels = tap.shape
    return Tap(tap.name, (channels, height, width), MAP)


def _channels(tap: Tap) -> int:
    return tap.shape[0] if tap.layout == MAP else tap.shape[-1]


def _positions(tap: Tap) -> int:
    return math.prod(tap.shape[1:] if tap.layout == MAP else tap.shape[:1])


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
    it changes; all in full precision. For tokens (N, L, C) both are a linear
    layer and a layer norm, and g is pooled where their number changes; class
    tokens are carried along. The gradient of its loss reaches every
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
        UsageError: If an argument is out of its range, or a tap is neither a
            feature map nor tokens.
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
        groups_of: dict[str, list[Tap]] = {}
        for tap in taps:
            if len(tap.shape) not in (2, 3):
                raise UsageError(
                    f'taps: {tap.name} gives shape {tap.shape} '
                    'per sample; AuxAdaptorAggregator takes '
                    'feature maps (C, H, W) and tokens (L, C)'
                )
            groups_of.setdefault(tap.module, []).append(tap)
        self.names = [tap.name for tap in taps]
        self.shapes = [tap.shape for tap in taps]
        self.parts = [[tap.name for tap in g] for g in groups_of.values()]
        self.adaptors = nn.ModuleList()
        previous: Tap | None = None
        for group in groups_of.values():
            adaptor = Adaptor(group, previous, width_ratio, groups)
            self.adaptors.append(adaptor)
            previous = adaptor.result
        width = _channels(previous)
        self.head = MMPRETRAIN_MODELS.build(
            dict(
                type='MultiLabelLinearClsHead'
                if isinstance(head, MultiLabelClsHead)
                else 'LinearClsHead',
                num_classes=num_classes,
                in_channels=width,
                _scope_='mmpretrain',
            )
        )
        # same kind of loss as F's, but not the same module: it may have state
        if not isinstance(getattr(head, 'loss_module', None), nn.Module):
            raise UsageError(
                f'architecture.head: {type(head).__name__} has no loss of its '
                'own that AuxAdaptorAggregator could use; allowed are heads '
                'with a loss_module'
            )
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
            for names, adaptor in zip(self.parts, self.adaptors, strict=True):
                parts = [outputs[name] for name in names]
                if self.dtype:
                    parts = [part.float() for part in parts]
                g = adaptor(parts, g)
            pooled = (
                g.mean(1)
                if g.dim() == 3
                else F.adaptive_avg_pool2d(g, 1).flatten(1)
            )
            return self.head((pooled,))

    def loss(self, outputs: dict[str, Tensor], data_samples: list) -> dict:
        """``loss_aux``, weighted. See :meth:`Guidance.loss`."""
        losses = self.head._get_loss(self(outputs), data_samples)
        return dict(loss_aux=losses['loss'] * self.loss_weight)
