"""Knowledge distillation: a float teacher."""

import copy
from collections.abc import Sequence

import torch
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.layers.checkpoint import check_architecture, normalise
from mmauxq.quantizers.base import flag
from mmauxq.registry import MODELS

from .adaptor import channels
from .base import AUX_LOGITS, Guidance, check_weights, student_logits
from .distance import build_connector, build_distance, comparable
from .find_taps import STAGE_ENDS, Taps, find_taps
from .taps import IMAGE, MAP, Tap
from .teacher import Teacher, build_network

KL = dict(type='mmrazor.KLDivergence')


@MODELS.register_module()
class KnowledgeDistillation(Guidance):
    """A float teacher, frozen or trained along.

    ::

        loss_logits  = loss_weight * d(logits of F, logits of the teacher)
        loss_p       = loss_weight * beta_p * d_p(c_p(O_p), T_p)
        loss_to_aux  = loss_weight * d'(logits of H, logits of the teacher)
        loss_teacher = L(logits of the teacher, targets)       if it is trained

    O_p and T_p are what F and the teacher give at tap p, c_p a connector that
    is dropped with the rest. All distances are losses of mmrazor, computed in
    float32. Its recorders are not used: they keep tensors that a later
    in-place ReLU overwrites.

    Without ``teacher``, F's own architecture in floating point teaches, and
    without ``checkpoint`` it has the weights that F starts from: the teacher
    of the LSQ paper (section 3.7), with its temperature 1 and equal weights.

    A frozen teacher runs in evaluation mode without gradient. Training
    checkpoints hold it, so that a resumed run has the same one whatever
    became of its file; slim checkpoints and optimizers do not.

    Sources: Hinton et al., Distilling the Knowledge in a Neural Network,
    arXiv:1503.02531 (logits); Romero et al., FitNets, arXiv:1412.6550
    (connectors); Zagoruyko and Komodakis, Paying More Attention to Attention,
    arXiv:1612.03928; Mishra and Marr, Apprentice, arXiv:1711.05852 (low-bit
    students, the teacher trained along).

    Args:
        taps: What is read from F: the images, then the features to compare.
        head: The head of F.
        num_classes: K.
        network: F in floating point, copied if it is the teacher.
        data_preprocessor: Of F.
        teacher: Config of an image classifier: ``'mmpretrain::...'``, a file,
            or a dict; ``None`` for F's architecture.
        checkpoint: Of the teacher, a file or URL; ``None`` only if there is
            no ``teacher``, or it is trained along.
        train_teacher: Whether the teacher is trained along, with its own task
            loss.
        logits: Config of the distance of the logits; ``None`` for no such
            term. A temperature far above 1 is known to hurt low-bit students.
        features: Config of the distance at each tap, e.g.
            ``dict(type='mmrazor.ATLoss', loss_weight=1000.0)``.
        betas: Weight of each tap, or one for all, not negative.
        teacher_taps: Places in the teacher, in the order of the taps; by
            default those of the same names, or else the ends of its stages.
        connector: Config of what leads from F's features to the teacher's,
            e.g. ``dict(type='mmrazor.ConvModuleConnector', act_cfg=None)``.
        guides_aux: Config of the distance of the auxiliary module's logits
            from the teacher's; ``None`` for no such term.
        least_accuracy: Top-1 in percent on the validation data below which
            training is refused; by default a tenth of the way from guessing
            to 100.
        loss_weight: Factor on all losses but the teacher's own.
        dtype: See :class:`Guidance`; of the connectors.

    Raises:
        UsageError: If the teacher has other classes, another input size, or
            other numbers of taps; or there are more or fewer weights than
            taps.
    """

    uses_image = True
    ready: Tensor

    def __init__(
        self,
        taps: Sequence[Tap],
        head: nn.Module,
        num_classes: int,
        network: nn.Module,
        data_preprocessor: nn.Module | None = None,
        teacher: str | dict | None = None,
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
        dtype: str | None = 'float32',
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(taps, head, num_classes, loss_weight, dtype, init_cfg)
        image, *taps = taps
        if not (logits or features or guides_aux):
            raise UsageError(
                'guidance: KnowledgeDistillation compares nothing; set '
                '`logits`, `features` or `guides_aux`'
            )
        if taps and not features:
            raise UsageError(
                'guidance.taps: KnowledgeDistillation compares features only '
                'if `features` is a distance'
            )
        if least_accuracy is None:
            guessing = 100 / num_classes
            least_accuracy = guessing + (100 - guessing) / 10
        self.least_accuracy = least_accuracy
        self.train_teacher = train_teacher
        model = self._network(network, teacher, checkpoint, image, num_classes)
        found = _teacher_taps(model, taps, teacher_taps, image)
        self._hold(Teacher(model, found, data_preprocessor, train_teacher))
        self.names = [tap.name for tap in taps]
        self.betas = check_weights(betas, taps, 'guidance.betas')
        self.logits = self.guides_aux = self.features = None
        if logits:
            self.logits = build_distance(
                logits, 'guidance.logits', num_classes
            )
        if guides_aux:
            self.needs.append(AUX_LOGITS)
            self.guides_aux = build_distance(
                guides_aux, 'guidance.guides_aux', num_classes
            )
        if features:
            self.features = build_distance(features, 'guidance.features')
        if connector and any(tap.layout != MAP for tap in taps):
            raise UsageError(
                'guidance.connector: connectors take feature maps (C, H, W); '
                f'{taps[0].name} gives {tuple(taps[0].shape)}'
            )
        self.connectors = nn.ModuleList(
            build_connector(
                connector, channels(mine), channels(its), 'guidance.connector'
            )
            if connector
            else nn.Identity()
            for mine, its in zip(taps, found.taps, strict=True)
        )
        self._compare_once(taps, found.taps)

    @classmethod
    def default_taps(cls, config: dict) -> str | None:
        """The ends of the stages if features are compared, else nothing."""
        return STAGE_ENDS if config.get('features') else None

    # --- the teacher -------------------------------------------------------

    def _network(
        self,
        ours: nn.Module,
        teacher: str | dict | None,
        checkpoint: str | None,
        image: Tap,
        num_classes: int,
    ) -> nn.Module:
        if teacher is None:
            model, size = copy.deepcopy(ours), None
            self.title = f'{type(model.backbone).__name__}, as F in float'
        else:
            model, size = build_network(teacher)
            self.title = type(model.backbone).__name__
            if checkpoint is None and not self.train_teacher:
                raise UsageError(
                    'guidance.checkpoint: a frozen teacher of its own config '
                    'needs one; set it, or train_teacher=True'
                )
        self.size = size
        self.check_size(image.shape[-1])
        _check_fits(model, image, num_classes)
        self._has_start = teacher is None or checkpoint is not None
        # else it takes the weights that F starts from
        self.register_buffer(
            'ready', flag(teacher is not None or checkpoint is not None)
        )
        if checkpoint is not None:
            state = CheckpointLoader.load_checkpoint(
                checkpoint, map_location='cpu'
            )
            source = f'guidance.checkpoint={checkpoint}'
            state = check_architecture(model, normalise(state, source), source)
            model.load_state_dict(state, strict=False)
            self.title += f' from {checkpoint}'
        return model

    def _hold(self, teacher: Teacher) -> None:
        """Keep the teacher, as a child only if it is trained."""
        self.recorders.append(teacher.recorder)
        if self.train_teacher:
            self.teacher = teacher
            if not hasattr(teacher.network.head, '_get_loss'):
                raise UsageError(
                    'guidance.train_teacher: a '
                    f'{type(teacher.network.head).__name__} has no loss that '
                    'takes logits; allowed are heads with one'
                )
            return
        self.frozen.append(teacher)
        self.register_state_dict_post_hook(_save_frozen)

    @property
    def mentor(self) -> Teacher:
        """The teacher, wherever it is kept."""
        return self.teacher if self.train_teacher else self.frozen[0]

    def check_size(self, width: int) -> None:
        """See that images so many pixels wide are the teacher's."""
        if self.size is not None and self.size != width:
            raise UsageError(
                f'guidance.teacher: it is made for images of {self.size} '
                f'pixels, F gets {width}; choose another teacher, or set '
                'model.input_shape if F gets others'
            )

    def init_weights(self) -> None:
        """As of any module; a teacher without a checkpoint starts anew."""
        if self.untrained:
            self.teacher.network.init_weights()
        super().init_weights()

    def prepare(self, network: nn.Module) -> None:
        """Give the teacher the weights that F starts from, if it is F."""
        if self.ready:
            return
        self.mentor.network.load_state_dict(network.state_dict(), strict=False)
        self.ready.fill_(1)
        print_log(
            'KnowledgeDistillation: the teacher has the weights that F '
            'starts from',
            logger='current',
        )

    @property
    def untrained(self) -> bool:
        """Whether it begins from random weights, and learns."""
        return self.train_teacher and not self._has_start

    def teach(self, images: Tensor) -> Tensor:
        """Logits of the teacher, (N, K).

        Args:
            images: (N, C, H, W), as F gets them.
        """
        return self.mentor(images)[0]

    # --- a step ------------------------------------------------------------

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """``'teacher'``, its logits (N, K), and the distances of features.

        Args:
            outputs: ``'image'``, and the features of F.
        """
        logits, theirs = self.mentor(outputs[IMAGE])
        found = dict(teacher=logits.float())
        for name, beta, connector, feature in zip(
            self.names, self.betas, self.connectors, theirs, strict=True
        ):
            with self.precision():
                mine = connector(self.cast(outputs[name]))
                # some losses of mmrazor call view() on what they get
                distance = self.features(
                    mine.float().contiguous(),
                    feature.detach().float().contiguous(),
                )
            found[f'loss_{name.removeprefix("backbone.")}'] = distance * beta
        return found

    def losses(
        self,
        found: dict[str, Tensor],
        signals: dict[str, Tensor],
        data_samples: list,
    ) -> dict[str, Tensor]:
        """``loss_logits``, ``loss_TAP``, ``loss_to_aux``, ``loss_teacher``."""
        logits = found['teacher']
        losses = {k: v for k, v in found.items() if k != 'teacher'}
        if self.logits is not None:
            losses['loss_logits'] = self.logits(
                student_logits(signals), logits
            )
        if self.guides_aux is not None:
            losses['loss_to_aux'] = self.guides_aux(
                signals[AUX_LOGITS].float(), logits
            )
        losses = {k: v * self.loss_weight for k, v in losses.items()}
        if self.train_teacher:
            head = self.teacher.network.head
            losses['loss_teacher'] = head._get_loss(logits, data_samples)[
                'loss'
            ]
        return losses

    def _compare_once(
        self, taps: Sequence[Tap], theirs: Sequence[Tap]
    ) -> None:
        """See that every pair of features can be compared."""
        for mine, its, connector in zip(
            taps, theirs, self.connectors, strict=True
        ):
            training = connector.training
            with torch.no_grad():
                x = connector.eval()(torch.zeros(2, *mine.shape))
            connector.train(training)
            if not comparable(self.features, x.shape, (2, *its.shape)):
                raise UsageError(
                    f'guidance.features: {mine.name} of F gives '
                    f'{tuple(mine.shape)} and {its.name} of the teacher '
                    f'{tuple(its.shape)}, which {type(self.features).__name__}'
                    ' cannot compare; choose other taps, or set a connector'
                )

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, *args, **kwargs
    ) -> None:
        inner = f'{prefix}teacher.'
        if self.frozen:
            state = {
                key[len(inner) :]: state_dict.pop(key)
                for key in [k for k in state_dict if k.startswith(inner)]
            }
            if state:
                self.frozen[0].load_state_dict(state)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _save_frozen(
    module: KnowledgeDistillation, state: dict, prefix: str, metadata: dict
) -> None:
    """Put a frozen teacher into the state dict."""
    for teacher in module.frozen:
        for key, value in teacher.state_dict().items():
            state[f'{prefix}teacher.{key}'] = value


def _check_fits(model: nn.Module, image: Tap, num_classes: int) -> None:
    """See that the teacher takes F's images and knows its classes."""
    shape = tuple(image.shape)
    training = model.training
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            logits = model.eval()(
                torch.zeros(2, *shape, device=device), mode='tensor'
            )
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f'guidance.teacher: it does not take images {shape} ({reason})'
        ) from error
    finally:
        model.train(training)
    if isinstance(logits, (tuple, list)) and len(logits):
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UsageError('guidance.teacher: it gives no logits (N, K)')
    if logits.shape[1] != num_classes:
        raise UsageError(
            f'guidance.teacher: it has {logits.shape[1]} classes, F has '
            f'{num_classes}'
        )


def _teacher_taps(
    model: nn.Module,
    taps: Sequence[Tap],
    teacher_taps: str | Sequence[str] | None,
    image: Tap,
) -> Taps:
    if not taps:
        return Taps([], [], False)
    if teacher_taps is None:
        names = {name for name, _ in model.named_modules()}
        same = [tap.name for tap in taps]
        teacher_taps = same if names.issuperset(same) else STAGE_ENDS
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    images = torch.randn(2, *image.shape, generator=generator).to(device)
    found = find_taps(
        model, teacher_taps, False, images, 'guidance.teacher_taps'
    )
    if len(found.taps) != len(taps):
        raise UsageError(
            f'guidance.teacher_taps: {len(found.taps)} places in the teacher '
            f'({", ".join(tap.name for tap in found.taps)}) for {len(taps)} '
            f'taps of F ({", ".join(tap.name for tap in taps)})'
        )
    return found
