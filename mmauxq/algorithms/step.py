"""A training step, run as it is written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmauxq.errors import UsageError

if TYPE_CHECKING:
    from .joint_qat import JointQAT

EAGER = 'eager'
FORMS = (None, 'auto', EAGER)


class Step:
    """Runs a training step as it is written, eagerly.

    Args:
        model: Whose step it is.
    """

    def __init__(self, model: 'JointQAT') -> None:
        self.model = model

    def __call__(self, inputs: Tensor) -> tuple[Tensor, list]:
        """Logits of F, (N, K), and the output of each guidance."""
        return self.run(self.model.compute, inputs)

    def run(self, compute: Callable[[Tensor], Any], inputs: Tensor) -> Any:
        """A function of the images, (N, C, H, W), with the taps recorded."""
        with self.model.recording():
            return compute(inputs)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """While active, hooks on the modules of F are called: always."""
        yield


def make_step(model: 'JointQAT', speed: Any) -> Any:
    """The step of ``model``, accelerated where ``speed`` asks for it.

    Args:
        model: Whose step it is.
        speed: ``None`` or ``'auto'`` for what a GPU allows, ``'eager'`` for
            the step as it is written, or the options of
            :class:`mmauxq.accelerate.Speed`.

    Raises:
        UsageError: If ``speed`` is none of these.
    """
    if isinstance(speed, str) and speed not in FORMS:
        raise UsageError(
            f"model.speed: expected 'auto', 'eager' or a dict, got {speed!r}"
        )
    if speed == EAGER or (speed in FORMS and not torch.cuda.is_available()):
        return Step(model)
    from mmauxq.accelerate import accelerate

    return accelerate(model, speed)
