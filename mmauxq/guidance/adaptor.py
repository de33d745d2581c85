"""One step of the aggregator: the adaptor of one block."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmauxq.errors import UsageError

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
                -channels(tap),
            ),
        )
        width = max(round(channels(main) * width_ratio), 1)
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
            if stride > 1 or channels(previous) != width:
                self.project = conv_bn(channels(previous), width, stride)
        elif channels(previous) != width or _positions(previous) != _positions(
            main
        ):
            self.project = linear_norm(channels(previous), width)

    def _phi(
        self, tap: Tap, taps: Sequence[Tap], width: int, groups: int
    ) -> nn.Sequential:
        in_channels = channels(_canonical(tap))
        if tap.layout == TOKENS:
            if groups > 1:
                raise UsageError(
                    f'guidance.groups={groups}: {tap.name} gives tokens, '
                    'which are adapted by linear layers; allowed is 1'
                )
            return linear_norm(in_channels, width)
        if in_channels % groups or width % groups:
            raise UsageError(
                f'guidance.groups={groups} does not divide the '
                f'{in_channels} channels of {tap.name} and the {width} '
                'of its adaptor'
            )
        return conv_bn(in_channels, width, groups=groups)

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


def channels(tap: Tap) -> int:
    """Width of what is found at a tap."""
    return tap.shape[0] if tap.layout == MAP else tap.shape[-1]


def _positions(tap: Tap) -> int:
    return math.prod(tap.shape[1:] if tap.layout == MAP else tap.shape[:1])
