"""Guidance by a float teacher."""

import copy

from torch import Tensor, nn

from mmauxq.checkpoint_file import read_source
from mmauxq.errors import UsageError, one_line
from mmauxq.log import log
from mmauxq.network import forked_generators, probing, sample_images
from mmauxq.network.checkpoint import check_architecture, normalise
from mmauxq.network.profile import logits_in
from mmauxq.quantizers.base import flag

from .base import Guidance
from .taps import Tap
from .teacher import Teacher, build_network

KL = dict(type='mmrazor.KLDivergence')


class Taught(Guidance):
    """Guidance that a float teacher takes part in.

    A subclass makes its ``teacher`` of what :meth:`build_teacher` returns.

    Args:
        num_classes: K.
        least_accuracy: Validation top-1 in percent below which training is
            refused; by default a tenth of the way from guessing to 100.
        loss_weight, dtype: See :class:`.base.Guidance`.

    Attributes:
        title: The teacher, in words.
        size: Side of its images in pixels, if it is for one size.
        ready: Whether it has its weights; else :meth:`prepare` gives it
            those that F starts from.
        untrained: Whether it learns from random weights on.
    """

    uses_image = True
    ready: Tensor
    teacher: Teacher

    def __init__(
        self,
        loss_weight: float,
        dtype: str | None,
        num_classes: int,
        least_accuracy: float | None,
    ) -> None:
        super().__init__(loss_weight, dtype)
        if least_accuracy is None:
            guessing = 100 / num_classes
            least_accuracy = guessing + (100 - guessing) / 10
        self.least_accuracy = least_accuracy

    def build_teacher(
        self,
        student: nn.Module,
        image: Tap,
        num_classes: int,
        teacher: str | dict | nn.Module | None,
        checkpoint: str | None,
        trained: bool = False,
    ) -> nn.Module:
        """The classifier that teaches, with the weights of its checkpoint.

        Args:
            student: F in floating point; copied if it teaches.
            image: The shape of F's images.
            num_classes: K.
            teacher: Config of an image classifier, or the file or name of
                one, or one that is built; by default F's architecture.
            checkpoint: File or URL; needed by a frozen ``teacher``.
            trained: Whether the teacher learns, too.

        Raises:
            UsageError: If it cannot be built, or does not take F's images to
                logits (N, K).
        """
        given = student if teacher is None else teacher
        if isinstance(given, nn.Module):
            model, self.size = copy.deepcopy(given), None
        else:
            model, self.size = build_network(given)
            if checkpoint is None and not trained:
                raise UsageError(
                    'guidance.checkpoint: expected the checkpoint of a frozen '
                    'teacher, got None; set it, or train_teacher=True of a '
                    'mmauxq.KnowledgeDistillation'
                )
        named = teacher is not None or checkpoint is not None
        self.untrained = trained and named and checkpoint is None
        self.register_buffer('ready', flag(named))
        self.title = type(model.backbone).__name__
        if teacher is None:
            self.title += ', as F in float'
        self.check_size(image.shape[-1])
        if checkpoint is not None:
            state = read_source(checkpoint)
            source = f'guidance.checkpoint={checkpoint}'
            state = check_architecture(model, normalise(state, source), source)
            model.load_state_dict(state, strict=False)
            self.title += f' from {checkpoint}'
        _check_fits(model, image, num_classes)
        return model

    def check_size(self, width: int) -> None:
        """A UsageError if the teacher is for images of another width, in
        pixels."""
        if self.size is not None and self.size != width:
            raise UsageError(
                'guidance.teacher: expected a teacher for images of '
                f'{width} pixels, got one for {self.size}; choose another '
                'teacher, or set model.input_shape if F gets others'
            )

    def init_weights(self) -> None:
        """Initialise; a teacher with weights keeps them."""
        if self.untrained:
            with forked_generators(self):
                self.teacher.network.init_weights()
        super().init_weights()

    def prepare(self, network: nn.Module) -> None:
        """Give the teacher the weights that F starts from, if it is F."""
        if self.ready:
            return
        self.teacher.network.load_state_dict(
            network.state_dict(), strict=False
        )
        self.ready.fill_(1)
        text = 'the teacher has the weights that F starts from'
        log(f'{type(self).__name__}: {text}')


def _check_fits(model: nn.Module, image: Tap, num_classes: int) -> None:
    """Check that the teacher takes F's images and has its classes."""
    try:
        with probing(model):
            output = model(sample_images(model, image.shape, 2), mode='tensor')
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(
            'guidance.teacher: expected one that takes images '
            f'{tuple(image.shape)}, got an error ({one_line(error, 200)})'
        ) from error
    logits = logits_in(output)
    if logits is None:
        raise UsageError(
            'guidance.teacher: expected a classifier that gives logits (N, K)'
        )
    if logits.shape[1] != num_classes:
        raise UsageError(
            f'guidance.teacher: expected {num_classes} classes, those of F, '
            f'got {logits.shape[1]}'
        )
