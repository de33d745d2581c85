"""The full-precision auxiliary module H."""

from collections.abc import Sequence

from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.registry import MODELS

from .adaptor import Adaptor, channels
from .base import AUX_LOGITS, Guidance, student_logits
from .classifier import own_classifier, pool
from .distance import build_distance
from .own_norms import OwnNorms
from .taps import IMAGE, Tap, TapRecorder

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

    Its classifier, a full-precision head that exists in training only, may
    also teach F: ``guides_student`` adds
    ``loss_to_student = loss_weight * d(logits of F, logits of H)``.

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
        guides_student: Config of the distance d, a loss of mmrazor such as
            ``dict(type='mmrazor.KLDivergence', tau=1.0, loss_weight=1.0)``,
            which lets no gradient into the logits of H unless it has
            ``teacher_detach=False``; ``None`` for no such term.
        separate_bn: Whether H reads a second pass through F, with batch norms
            of its own, as in the first version of the paper; see
            :class:`.own_norms.OwnNorms`. By default both share one pass, as
            in the second version.
        dtype: See :class:`Guidance`.
        init_cfg: As of any BaseModule; by default that of mmpretrain's
            ResNet.

    Raises:
        UsageError: If an argument is out of its range, or a tap is neither a
            feature map nor tokens.
    """

    uses_stem = True
    gives = AUX_LOGITS

    def __init__(
        self,
        taps: Sequence[Tap],
        head: nn.Module,
        num_classes: int,
        loss_weight: float = 1.0,
        width_ratio: float = 1.0,
        groups: int = 1,
        guides_student: dict | None = None,
        separate_bn: bool = False,
        dtype: str | None = 'float32',
        init_cfg: dict | Sequence[dict] = INIT,
    ) -> None:
        super().__init__(
            taps, head, num_classes, loss_weight, dtype, list(init_cfg)
        )
        if (
            isinstance(width_ratio, bool)
            or not isinstance(width_ratio, (int, float))
            or not 0 < width_ratio <= 1
        ):
            raise UsageError(
                f'guidance.width_ratio={width_ratio!r}; allowed '
                'are numbers above 0, up to 1'
            )
        if (
            isinstance(groups, bool)
            or not isinstance(groups, int)
            or groups < 1
        ):
            raise UsageError(
                f'guidance.groups={groups!r}; allowed are integers from 1'
            )
        if not isinstance(separate_bn, bool):
            raise UsageError(
                f'guidance.separate_bn={separate_bn!r}; allowed are True and '
                'False'
            )
        self.separate_bn = separate_bn
        self.second_pass: OwnNorms | None = None
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
        self.layout = previous.layout
        self.head = own_classifier(head, channels(previous), num_classes)
        self.guides_student = None
        if guides_student is not None:
            self.guides_student = build_distance(
                guides_student, 'guidance.guides_student', num_classes
            )

    def attach(self, network: nn.Module, recorder: TapRecorder) -> TapRecorder:
        """With ``separate_bn``, nothing is read in F's own pass."""
        if not self.separate_bn:
            return recorder
        self.second_pass = OwnNorms(network, recorder)
        self.recorders.append(recorder)
        return TapRecorder(network, [])

    def prepare(self, network: nn.Module) -> None:
        """The batch norms of a second pass start as F's."""
        if self.second_pass is not None:
            self.second_pass.prepare()

    def forward(self, outputs: dict[str, Tensor]) -> Tensor:
        """Logits of the auxiliary classifier, (N, K)."""
        if self.second_pass is not None:
            outputs = self.second_pass(outputs[IMAGE])
        with self.precision():
            g = None
            for names, adaptor in zip(self.parts, self.adaptors, strict=True):
                g = adaptor([self.cast(outputs[name]) for name in names], g)
            return self.head((pool(g, self.layout),))

    def losses(
        self, found: Tensor, signals: dict[str, Tensor], data_samples: list
    ) -> dict[str, Tensor]:
        """``loss_aux`` and ``loss_to_student``, weighted."""
        loss = self.head._get_loss(found, data_samples)['loss']
        losses = dict(loss_aux=loss * self.loss_weight)
        if self.guides_student is not None:
            distance = self.guides_student(student_logits(signals), found)
            losses['loss_to_student'] = distance * self.loss_weight
        return losses
