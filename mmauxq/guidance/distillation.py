"""Knowledge distillation from a float teacher."""

from collections.abc import Sequence

import torch
from mmengine.model import ModuleList
from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.network import TrainingPass, probing, sample_images
from mmauxq.registry import MODELS

from .base import TaskLoss, check_weights, full_precision, student_logits
from .distance import build_distance, build_module, comparable
from .find_taps import STAGE_ENDS, Taps, find_taps
from .taps import IMAGE, MAP, Tap
from .taught import KL, Taught
from .teacher import Teacher


@MODELS.register_module()
class KnowledgeDistillation(Taught):
    """A float teacher, frozen or trained along.

    ::

        loss_logits  = loss_weight * d(logits of F, logits of the teacher)
        loss_p       = loss_weight * beta_p * d_p(c_p(O_p), T_p)
        loss_to_aux  = loss_weight * d'(logits of H, logits of the teacher)
        loss_teacher = L(logits of the teacher, targets)       if it is trained

    O_p and T_p are the outputs of F and of the teacher at tap p, c_p is a
    connector. All distances are losses of mmrazor, computed in float32.

    Without ``teacher``, F's own architecture in floating point teaches, and
    without ``checkpoint`` it has the weights that F starts from: the teacher
    of the LSQ paper (arXiv:1902.08153, section 3.7), with its temperature 1
    and equal weights.

    Training checkpoints hold the teacher, so that a resumed run has the same
    one even if its file is gone; slim checkpoints do not.

    Sources: Hinton et al., Distilling the Knowledge in a Neural Network,
    arXiv:1503.02531 (logits); Romero et al., FitNets, arXiv:1412.6550
    (connectors); Zagoruyko and Komodakis, Paying More Attention to Attention,
    arXiv:1612.03928; Mishra and Marr, Apprentice, arXiv:1711.05852 (low-bit
    students, the teacher trained along).

    Args:
        taps: What is read from F: the images, then the features to compare.
        num_classes, network, data_preprocessor: See
            :class:`.base.Guidance`. The network is copied if it teaches.
        teacher: Config of an image classifier, or the file or name of one
            (``mmpretrain::resnet/resnet34_8xb32_in1k.py``), or one that is
            built; by default F's architecture.
        checkpoint: File or URL; needed by a frozen ``teacher``.
        train_teacher: Whether the teacher learns too, from its own task loss.
        logits: Config of the distance d; ``None`` for no such term. Its
            temperature ``tau`` is worth a comparison: 4 gains much with a
            strong teacher, and has also been seen to hurt low-bit students.
        features: Config of the distances d_p, e.g.
            ``dict(type='mmrazor.ATLoss', loss_weight=1000.0)``.
        betas: Weight of each tap, or one for all.
        teacher_taps: Places in the teacher, in the order of the taps; by
            default those of the same names, or else the ends of its stages.
        connector: Config of c_p, e.g.
            ``dict(type='mmrazor.ConvModuleConnector', act_cfg=None)``.
        guides_aux: Config of the distance d'; ``None`` for no such term.
        least_accuracy: Validation top-1 in percent below which training is
            refused; by default a tenth of the way from guessing to 100.
        loss_weight: Factor on all losses except the teacher's own.
        dtype: ``None`` lets autocast decide, as for F; ``'float32'`` computes
            the connectors in float32 also under automatic mixed precision.
        init_cfg: Initialisation of the connectors.

    Raises:
        UsageError: If the teacher does not fit, or the number of weights.
    """

    def __init__(
        self,
        taps: Sequence[Tap],
        num_classes: int,
        network: nn.Module,
        data_preprocessor: nn.Module | None = None,
        teacher: str | dict | nn.Module | None = None,
        checkpoint: str | None = None,
        train_teacher: bool = False,
        logits: dict | None = KL,
        features: dict | None = None,
        betas: float | Sequence[float] = 1.0,
        teacher_taps: str | Sequence[str] | None = None,
        connector: dict | None = None,
        guides_aux: dict | None = None,
        least_accuracy: float | None = None,
        loss_weight: float = 1.0,
        dtype: str | None = None,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(loss_weight, dtype, num_classes, least_accuracy)
        image, *taps = taps
        if not (logits or features or guides_aux):
            raise UsageError(
                'guidance: expected `logits`, `features` or `guides_aux`, got '
                'a KnowledgeDistillation that compares nothing'
            )
        if taps and not features:
            raise UsageError(
                'guidance.features: expected a distance, which the taps of '
                'KnowledgeDistillation are for, got None'
            )
        model = self.build_teacher(
            network, image, num_classes, teacher, checkpoint, train_teacher
        )
        places = _teacher_taps(model, taps, teacher_taps, image)
        recorder = places.recorder(model, train_teacher)
        self.teacher = Teacher(
            model, recorder, data_preprocessor, train_teacher
        )
        self.recorders.append(recorder)
        self.names = [tap.name for tap in taps]
        self.betas = check_weights(betas, taps, 'guidance.betas')
        self.needs_aux_logits = bool(guides_aux)
        self.logits = build_distance(logits, 'guidance.logits', num_classes)
        self.guides_aux = build_distance(
            guides_aux, 'guidance.guides_aux', num_classes
        )
        self.features = build_distance(features, 'guidance.features')
        pairs = zip(taps, places.taps, strict=True)
        self.connectors = ModuleList(
            (self._connector(connector, *pair) for pair in pairs), init_cfg
        )

    @classmethod
    def default_taps(cls, config: dict) -> str | None:
        """The ends of the stages if features are compared, else nothing."""
        return STAGE_ENDS if config.get('features') else None

    def _connector(
        self, config: dict | None, tap: Tap, place: Tap
    ) -> nn.Module:
        """From the features of F at ``tap`` to the teacher's at ``place``."""
        connector: nn.Module = nn.Identity()
        if config:
            if tap.layout != MAP:
                raise UsageError(
                    'guidance.connector: expected taps with feature maps '
                    f'(C, H, W), got {tap.shape} from {tap.name}'
                )
            widths = dict(in_channel=tap.channels, out_channel=place.channels)
            connector = build_module(config, 'guidance.connector', **widths)
        with probing(connector):
            x = connector(torch.zeros(2, *tap.shape))
        if not comparable(self.features, x.shape, (2, *place.shape)):
            raise UsageError(
                f'guidance.features: {tap.name} of F gives {tap.shape} and '
                f'{place.name} of the teacher {place.shape}, which '
                f'{type(self.features).__name__} cannot compare; choose '
                'other taps, or set a connector'
            )
        return connector

    # --- a step ------------------------------------------------------------

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """``'teacher'``, its logits (N, K), and ``loss_TAP``, the distances of
        features."""
        logits, theirs = self.teacher(outputs[IMAGE])
        results = dict(teacher=logits.float())
        places = self.names, self.betas, self.connectors, theirs
        for name, beta, connector, feature in zip(*places, strict=True):
            with self.precision():
                ours = connector(self.cast(outputs[name]))
            with full_precision(ours.device):
                # some losses of mmrazor call view() on their arguments
                distance = self.features(
                    ours.float().contiguous(),
                    feature.detach().float().contiguous(),
                )
            results[f'loss_{name.removeprefix("backbone.")}'] = distance * beta
        return results

    def losses(
        self,
        output: dict[str, Tensor],
        logits: Tensor | None,
        aux_logits: Tensor | None,
        task_loss: TaskLoss,
    ) -> dict[str, Tensor]:
        """``loss_logits``, ``loss_TAP``, ``loss_to_aux``, ``loss_teacher``."""
        taught = output['teacher']
        losses = {k: v for k, v in output.items() if k != 'teacher'}
        if self.logits is not None:
            losses['loss_logits'] = self.logits(student_logits(logits), taught)
        if self.guides_aux is not None:
            losses['loss_to_aux'] = self.guides_aux(aux_logits.float(), taught)
        losses = {k: v * self.loss_weight for k, v in losses.items()}
        if self.teacher.trained:
            losses['loss_teacher'] = task_loss(taught)
        return losses


def _teacher_taps(
    model: nn.Module,
    taps: Sequence[Tap],
    teacher_taps: str | Sequence[str] | None,
    image: Tap,
) -> Taps:
    if not taps:
        return Taps()
    if teacher_taps is None:
        names = {name for name, _ in model.named_modules()}
        same = [tap.name for tap in taps]
        teacher_taps = same if names.issuperset(same) else STAGE_ENDS
    run = TrainingPass(model, sample_images(model, image.shape, 2))
    found = find_taps(run, teacher_taps, place='guidance.teacher_taps')
    if len(found.taps) != len(taps):
        raise UsageError(
            f'guidance.teacher_taps: expected {len(taps)} places, one for '
            f'each tap of F ({", ".join(tap.name for tap in taps)}), got '
            f'{len(found.taps)} ({", ".join(t.name for t in found.taps)})'
        )
    return found
