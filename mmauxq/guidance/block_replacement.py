"""Block replacement: F's blocks inside of a float network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmauxq.errors import UsageError, one_line
from mmauxq.network import TrainingPass, probing, sample_images
from mmauxq.registry import MODELS

from .base import TaskLoss
from .distance import build_distance
from .find_taps import STAGE_ENDS
from .taps import IMAGE, Tap, TapRecorder, check_tap
from .taught import KL, Taught
from .teacher import Teacher


@MODELS.register_module()
class BlockReplacement(Taught):
    """Side paths from F's blocks through the rest of a frozen float network.

    ::

        z_p = later blocks and classifier of T (O_p)          p = 1..P
        loss_replaced = loss_weight
                        * mean over p of (L(z_p, targets) + d(z_p, z_T))

    T is a network of F's architecture in floating point. In path p, F's output
    O_p at tap p takes the place of the output that T has there, so that the
    blocks before the tap are those of F, the others those of T. The gradient
    reaches F's blocks through float blocks that are trained already. z_T are
    the logits of T, and d is a loss of mmrazor, computed in float32.

    T runs once for all: the P outputs join its own batch of N images at their
    taps, and ``(P + 1) N`` leave it as logits. Each path costs a forward and a
    backward pass through the part of T behind its tap, and the memory for
    that: with a tap after each block about P / 2 times those of T, much less
    with the ends of the stages.

    T has no gradients and is in evaluation mode. Training checkpoints hold it,
    so that a resumed run has the same one; slim checkpoints do not.

    Source: Yu et al., Improving Quantization-aware Training of Low-Precision
    Network via Block Replacement on Full-Precision Counterpart,
    arXiv:2412.15846, of which the networks are taken, trained beside F. The
    terms of the loss are of this package, with their mean, equal weights and
    temperature 1. A ``mmauxq.KnowledgeDistillation`` beside it in the list
    adds the distillation of F's own logits; it has, and runs, a teacher of
    its own.

    Args:
        taps: What is read from F: the images, then the blocks' outputs, each
            one tensor and all that T's later blocks get.
        num_classes, network, data_preprocessor: See
            :class:`.base.Guidance`. The network is copied if it is T.
        teacher: T, as a config of an image classifier, its file or name, or
            one that is built; by default F's architecture, which its backbone
            must have in any case.
        checkpoint: File or URL of T's weights, needed by a ``teacher``; by
            default T has the weights that F starts from.
        logits: Config of the distance d; ``None`` for no such term.
        least_accuracy: See :class:`.taught.Taught`.
        loss_weight: Factor on the loss.
        dtype: ``None`` lets autocast decide, as for F; ``'float32'`` computes
            T in float32 also under automatic mixed precision.

    Raises:
        UsageError: If T has not F's architecture, or a tap does not fit.
    """

    def __init__(
        self,
        taps: Sequence[Tap],
        num_classes: int,
        network: nn.Module,
        data_preprocessor: nn.Module | None = None,
        teacher: str | dict | nn.Module | None = None,
        checkpoint: str | None = None,
        logits: dict | None = KL,
        least_accuracy: float | None = None,
        loss_weight: float = 1.0,
        dtype: str | None = None,
    ) -> None:
        super().__init__(loss_weight, dtype, num_classes, least_accuracy)
        image, *taps = taps
        if not taps:
            raise UsageError(
                'guidance.taps: expected blocks to replace, got None'
            )
        model = self.build_teacher(
            network, image, num_classes, teacher, checkpoint
        )
        images = sample_images(model, image.shape, 2)
        _check_same_blocks(network, model, taps, images)
        self.names = [tap.name for tap in taps]
        self.replacer = BlockReplacer(model, self.names)
        self.teacher = Teacher(model, self.replacer, data_preprocessor)
        self.recorders.append(self.replacer)
        self.logits = build_distance(logits, 'guidance.logits', num_classes)
        self._check_paths(taps, images)

    @classmethod
    def default_taps(cls, config: dict) -> str | None:
        """The ends of the stages: each tap costs a part of T."""
        return STAGE_ENDS

    def _check_paths(self, taps: Sequence[Tap], images: Tensor) -> None:
        """Check that nothing gets around the blocks that are replaced."""
        zeros = {t.name: images.new_zeros(2, *t.shape) for t in taps}
        try:
            with probing(self.teacher):
                self({IMAGE: images, **zeros})
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UsageError(
                'guidance.taps: expected blocks whose output is all that '
                f'later ones get, got {", ".join(self.names)}, around one of '
                f'which something leads ({one_line(error, 200)})'
            ) from error

    def forward(self, outputs: dict[str, Tensor]) -> Tensor:
        """The logits of T and of the paths, (1 + P, N, K)."""
        images = outputs[IMAGE]
        with self.precision():
            for name in self.names:
                self.replacer.given[name] = self.cast(outputs[name])
            logits, _ = self.teacher(self.cast(images))
            self.replacer.given.clear()
        return logits.unflatten(0, (1 + len(self.names), len(images)))

    def losses(
        self,
        output: Tensor,
        logits: Tensor | None,
        aux_logits: Tensor | None,
        task_loss: TaskLoss,
    ) -> dict[str, Tensor]:
        """``loss_replaced``, from the logits (1 + P, N, K)."""
        theirs, *paths = output.float()
        terms = [task_loss(path) for path in paths]
        if self.logits is not None:
            terms += [self.logits(path, theirs.detach()) for path in paths]
        loss = torch.stack(terms).sum() / len(paths)
        return dict(loss_replaced=loss * self.loss_weight)


class BlockReplacer(TapRecorder):
    """Appends given tensors to what modules return, while it is entered.

    A module that returns (M, ...) for which (N, ...) is given returns
    (M + N, ...). Nothing is kept.

    Attributes:
        given: Name of a module -> the tensor; those without one return what
            they would.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__(model, names)
        self.given: dict[str, Tensor] = {}

    def _keep(self, name: str, value: Any) -> Tensor | None:
        self._ran.add(name)
        if name not in self.given:
            return None
        grad = torch.is_grad_enabled() or not self._needs_grad
        check_tap('guidance.taps', name, type(value).__name__, grad, True)
        return torch.cat([value, self.given[name]])


def _check_same_blocks(
    network: nn.Module,
    model: nn.Module,
    taps: Sequence[Tap],
    images: Tensor,
) -> None:
    """Check that T has the backbone of F, and the same outputs at the taps."""
    ours, theirs = (
        {name: x.shape for name, x in part.backbone.state_dict().items()}
        for part in (network, model)
    )
    if ours != theirs:
        name = next(n for n in ours | theirs if ours.get(n) != theirs.get(n))
        raise UsageError(
            'guidance.teacher: expected the architecture of F '
            f'({type(network.backbone).__name__}), whose blocks it takes, got '
            f'a {type(model.backbone).__name__} that differs in {name}'
        )
    calls = TrainingPass(model, images).calls
    for tap in taps:
        call = calls.get(tap.name)
        shapes = [tuple(x.shape[1:]) for x in call.outputs] if call else []
        if call is None or call.kind != 'Tensor' or shapes != [tap.shape]:
            found = call.kind if call else 'nothing'
            raise UsageError(
                'guidance.taps: expected blocks that return one tensor, of '
                f'the same shape in F and in the teacher, got {tap.name} '
                f'with {tap.shape} in F, {found} {shapes} in the teacher'
            )
