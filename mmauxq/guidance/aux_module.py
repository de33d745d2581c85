"""The full-precision auxiliary module H: adaptors, aggregator, classifier."""

import math
from collections.abc import Sequence
from itertools import groupby

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmauxq.errors import UsageError, check_integer
from mmauxq.registry import MODELS

from .auxiliary_bn import AuxiliaryBN
from .base import (
    Guidance,
    TaskLoss,
    is_weight,
    linear_classifier,
    pool,
    student_logits,
)
from .distance import build_distance
from .taps import CHANNELS_LAST, IMAGE, MAP, TOKENS, Tap, TapRecorder
from .tokens import resize_tokens, to_map

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
    it changes; none is quantized. For tokens (N, L, C) both are a linear
    layer and a layer norm, and g is pooled where their number changes; class
    tokens are carried along.

    Its classifier may also teach F: ``guides_student`` adds
    ``loss_to_student = loss_weight * d(logits of F, logits of H)``.

    Source: Zhuang et al., Training Quantized Neural Networks with a
    Full-precision Auxiliary Module, CVPR 2020, arXiv:1903.11236, section 3
    (adaptor and aggregator: 3.1, joint training: 3.2).

    Args:
        taps, num_classes, dtype: See :class:`.base.Guidance`.
        loss_weight: Weight of the auxiliary loss.
        width_ratio: Channels of g_p over those of O_p, in (0, 1]; 1 is the
            paper's, and the cost of H is about proportional.
        groups: Groups of the convolutions phi; they must divide the channels
            of every tapped block and of every g_p.
        guides_student: Config of the distance d, a loss of mmrazor such as
            ``dict(type='mmrazor.KLDivergence', tau=1.0, loss_weight=1.0)``,
            which lets no gradient into the logits of H unless it has
            ``teacher_detach=False``; ``None`` for no such term.
        separate_bn: Whether H reads a second pass through F, with batch norms
            of its own (:class:`.auxiliary_bn.AuxiliaryBN`), as in the first
            version of the paper; by default both share one pass, as in the
            second.
        init_cfg: Initialisation; by default that of mmpretrain's ResNet.

    Raises:
        UsageError: If an argument is out of its range, or a tap is neither a
            feature map nor tokens.
    """

    uses_stem = True
    gives_aux_logits = True

    def __init__(
        self,
        taps: Sequence[Tap],
        num_classes: int,
        loss_weight: float = 1.0,
        width_ratio: float = 1.0,
        groups: int = 1,
        guides_student: dict | None = None,
        separate_bn: bool = False,
        dtype: str | None = None,
        init_cfg: dict | Sequence[dict] = INIT,
    ) -> None:
        super().__init__(loss_weight, dtype, list(init_cfg))
        if not is_weight(width_ratio) or not 0 < width_ratio <= 1:
            raise UsageError(
                'guidance.width_ratio: expected a number above 0, at most 1, '
                f'got {width_ratio!r}'
            )
        check_integer('guidance.groups', groups, 1)
        if not isinstance(separate_bn, bool):
            raise UsageError(
                'guidance.separate_bn: expected True or False, got '
                f'{separate_bn!r}'
            )
        self.separate_bn = separate_bn
        self.second_pass: AuxiliaryBN | None = None
        self.adaptors = nn.ModuleList()
        g: Tap | None = None
        for _, block in groupby(taps, key=lambda t: t.name.partition(':')[0]):
            self.adaptors.append(Adaptor(list(block), g, width_ratio, groups))
            g = self.adaptors[-1].result
        self.head = linear_classifier(g.channels, num_classes)
        self.guides_student = build_distance(
            guides_student, 'guidance.guides_student', num_classes
        )

    def attach(self, network: nn.Module, recorder: TapRecorder) -> TapRecorder:
        """With ``separate_bn``, nothing is read in F's own pass."""
        if not self.separate_bn:
            return recorder
        self.second_pass = AuxiliaryBN(network, recorder)
        self.recorders.append(recorder)
        return TapRecorder(network, [])

    def prepare(self, network: nn.Module) -> None:
        """The batch norms of a second pass start as those of F."""
        if self.second_pass is not None:
            self.second_pass.prepare()

    def forward(self, outputs: dict[str, Tensor]) -> Tensor:
        """Logits of the auxiliary classifier, (N, K), from the O_p or, with
        ``separate_bn``, from the images."""
        if self.second_pass is not None:
            outputs = self.second_pass(outputs[IMAGE])
        with self.precision():
            g = None
            for adaptor in self.adaptors:
                g = adaptor([self.cast(outputs[n]) for n in adaptor.names], g)
            return self.head(pool(g, adaptor.result.layout))

    def losses(
        self,
        output: Tensor,
        logits: Tensor | None,
        aux_logits: Tensor | None,
        task_loss: TaskLoss,
    ) -> dict[str, Tensor]:
        """``loss_aux`` and ``loss_to_student``, from logits (N, K)."""
        losses = dict(loss_aux=task_loss(output) * self.loss_weight)
        if self.guides_student is not None:
            distance = self.guides_student(
                student_logits(logits), output.float()
            )
            losses['loss_to_student'] = distance * self.loss_weight
        return losses


class Adaptor(BaseModule):
    """One step of the aggregator: ``g_p = ReLU(phi(O_p) + project(g))``.

    A block that gives several tensors has a ``phi`` for each; their outputs
    are summed at the smallest of the sizes. ``previous`` is the layout and
    shape of g_{p-1}, and ``result`` that of g_p, a map or tokens.
    """

    def __init__(
        self,
        taps: Sequence[Tap],
        previous: Tap | None,
        width_ratio: float,
        groups: int,
    ) -> None:
        super().__init__()
        maps = [tap for tap in taps if tap.layout != TOKENS]
        # the deepest: smallest, and then widest
        main = min(
            maps or taps, key=lambda tap: (math.prod(tap.size), -tap.channels)
        )
        width = max(round(main.channels * width_ratio), 1)
        self.names = [tap.name for tap in taps]
        self.layouts = [tap.layout for tap in taps]
        phi = [_build_phi(tap, width, groups) for tap in taps]
        self.phi = phi[0] if len(phi) == 1 else nn.ModuleList(phi)
        self.result = Tap(main.name, (*main.size, width), TOKENS)
        if maps:
            self.result = Tap(main.name, (width, *main.size))
        self.project: nn.Module | None = None
        if previous is None:
            return
        self.project = nn.Identity()
        channels, size = previous.channels, previous.size
        if maps:
            # blocks round an odd size up (padding) or down (pooling)
            stride = 1
            if previous.layout == MAP:
                stride = max(round(size[0] / main.size[0]), 1)
            if stride > 1 or channels != width:
                self.project = conv_bn(channels, width, stride)
        elif channels != width or math.prod(size) != main.size[0]:
            self.project = linear_norm(channels, width)

    def _adapt(self, outputs: Sequence[Tensor]) -> Tensor:
        phi = [self.phi] if len(self.layouts) == 1 else self.phi
        parts = zip(phi, self.layouts, outputs, strict=True)
        adapted = [
            module(x.permute(0, 3, 1, 2) if layout == CHANNELS_LAST else x)
            for module, layout, x in parts
        ]
        if len(adapted) == 1:
            return adapted[0]
        if self.result.layout == MAP:
            maps = [x if x.dim() == 4 else to_map(x) for x in adapted]
            sizes = [x.shape[-2:] for x in adapted if x.dim() == 4]
            size = min(sizes, key=math.prod)
            adapted = [F.adaptive_avg_pool2d(x, size) for x in maps]
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


def conv_bn(
    in_channels: int, out_channels: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """1x1 convolution + batch norm, full precision."""
    convolution = nn.Conv2d(
        in_channels, out_channels, 1, stride, groups=groups, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


def linear_norm(in_channels: int, out_channels: int) -> nn.Sequential:
    """Linear layer + layer norm, full precision: the same for tokens."""
    linear = nn.Linear(in_channels, out_channels, bias=False)
    return nn.Sequential(linear, nn.LayerNorm(out_channels))


def _build_phi(tap: Tap, width: int, groups: int) -> nn.Sequential:
    if len(tap.shape) not in (2, 3):
        raise UsageError(
            'taps: expected feature maps (C, H, W) or tokens (L, C) per '
            f'sample, got shape {tap.shape} from {tap.name}'
        )
    if tap.layout == TOKENS:
        if groups > 1:
            raise UsageError(
                'guidance.groups: expected 1 for tokens, which are adapted '
                f'by linear layers, got {groups} ({tap.name})'
            )
        return linear_norm(tap.channels, width)
    if tap.channels % groups or width % groups:
        raise UsageError(
            f'guidance.groups: expected a divisor of the {tap.channels} '
            f'channels of {tap.name} and of the {width} of its adaptor, '
            f'got {groups}'
        )
    return conv_bn(tap.channels, width, groups=groups)
