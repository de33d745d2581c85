"""Joint training of a low-precision network and its guidance."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from mmengine.model import BaseModel
from mmpretrain.models import ImageClassifier
from torch import Tensor, nn

from mmauxq.config_types import with_names
from mmauxq.guidance import Guidance, Tap, TapRecorder
from mmauxq.guidance.taps import IMAGE
from mmauxq.network import profile
from mmauxq.quantizers import named_quantizers
from mmauxq.registry import MODELS

from . import build
from .arguments import check_sections, check_shape
from .classifier_inside import ClassifierInside
from .head_loss import as_samples, head_logits, is_plain, own_loss, task_loss
from .state import (
    adapt_state,
    initialising,
    keep_all,
    keep_scales_positive,
    load_float,
    set_scales,
)


@MODELS.register_module()
class JointQAT(ClassifierInside, BaseModel):
    """Quantization-aware training of a classifier, with guidance.

    In mode ``loss`` the quantized network F runs once. Its head gives the
    losses ``student.*``, its taps give ``guidance.*``; the runner sums them.
    In the modes ``predict`` and ``tensor`` F runs alone.

    Args:
        architecture: Config of an mmpretrain image classifier, or a built
            one; its convolution and linear layers are quantized in place.
        quantizers: ``dict(weight=..., activation=...)``, each a config of a
            quantizer with ``type``, ``bits`` and, optionally,
            ``per_channel``.
        policy: Arguments of :class:`mmauxq.layers.Policy`: which layers
            differ from that.
        guidance: Config of a guidance, with ``taps`` (``'auto'``,
            ``'stage_ends'`` or shell patterns of module names) beside its own
            arguments; a list of such configs for several at once; ``None``
            trains F alone.
        float_checkpoint: File or URL of a float checkpoint of the
            architecture, loaded by ``init_weights``.
        input_shape: (C, H, W) of an image, for the pass that finds layers and
            shapes. The commands set it from the data of a recipe; by default
            it is what the backbone declares, else 224 pixels.
        speed: How a training step is run: ``'auto'`` or ``None`` for what a
            GPU allows, ``'eager'`` for the step as it is written, or the
            options of :class:`mmauxq.accelerate.Speed`. All compute the same.
        data_preprocessor: Handed down to the architecture.

    Attributes:
        description: What F is, in plain values: ``architecture``, ``None`` if
            it was built already, ``quantizers``, ``policy``, ``input_shape``.

    Raises:
        UsageError: If a config asks for something that does not exist.
    """

    def __init__(
        self,
        architecture: dict | BaseModel,
        quantizers: dict,
        policy: dict | None = None,
        guidance: dict | Sequence[dict] | None = None,
        float_checkpoint: str | None = None,
        input_shape: Sequence[int] | None = None,
        speed: str | dict | None = None,
        data_preprocessor: dict | nn.Module | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        check_sections(architecture, quantizers, policy, guidance)
        given = architecture if isinstance(architecture, dict) else None
        architecture = build.build_architecture(
            architecture, data_preprocessor
        )
        super().__init__(architecture.data_preprocessor, init_cfg)
        self.architecture = architecture
        self.float_checkpoint = float_checkpoint
        self._float_start = False
        self._started = False

        found = profile(architecture, check_shape(input_shape))
        self.cost = build.Cost.of(found)
        self.taps: list[Tap] = []
        self.recorders: list[TapRecorder] = []
        self.guidance: nn.Module | None = None
        if guidance is not None:
            self.guidance = build.build_guidance(self, guidance, found)
        self.bits = build.quantize(architecture, found, quantizers, policy)
        build.log_bits(self.bits)
        self.description = with_names(
            dict(
                architecture=given,
                quantizers=quantizers,
                policy=policy,
                input_shape=found.shape,
            )
        )
        self.register_state_dict_pre_hook(keep_scales_positive)
        self._register_state_dict_hook(keep_all)
        self.step = build.accelerated_step(self, speed)

    @property
    def guidances(self) -> list[Guidance]:
        """All of them, in the order of the config."""
        if isinstance(self.guidance, Guidance):
            return [self.guidance]
        return [] if self.guidance is None else list(self.guidance)

    @property
    def has_own_loss(self) -> bool:
        """Whether the loss of F needs more than its logits."""
        return not is_plain(self.architecture)

    # --- a training step ---------------------------------------------------

    def forward(
        self,
        inputs: Tensor,
        data_samples: Any = None,
        mode: str = 'tensor',
    ) -> Any:
        """In mode ``'loss'`` that of :meth:`loss`, with the same arguments;
        in ``'predict'`` and ``'tensor'`` that of the architecture."""
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        run = partial(self.architecture, inputs, data_samples, mode=mode)
        return run() if self.step is None else self.step.evaluate(run)

    def loss(
        self, inputs: Tensor, data_samples: Any = None
    ) -> dict[str, Tensor]:
        """Losses of F and of its guidance.

        Args:
            inputs: (N, C, H, W).
            data_samples: With the targets, as mmpretrain's heads take them,
                or the targets themselves: indices of classes (N,), int64, or
                scores (N, K).

        Returns:
            ``student.*`` and ``guidance.*``; of a list of guidances
            ``guidance.0.*``, ``guidance.1.*``, ...
        """
        data_samples = as_samples(self.architecture, data_samples)
        if not self._started:
            self._start(inputs)
        if self.has_own_loss:
            compute = partial(self._own_loss, data_samples=data_samples)
            student, logits, outputs = self._run(compute, inputs)
        else:
            logits, outputs = self._run(self.compute, inputs)
            student = self.architecture.head._get_loss(logits, data_samples)
        losses = add_prefix(student, 'student')
        task = partial(
            task_loss, self.architecture.head, data_samples, own=logits
        )
        pairs = list(zip(self.guidances, outputs, strict=True))
        aux_logits = next((o for g, o in pairs if g.gives_aux_logits), None)
        for i, (guidance, output) in enumerate(pairs):
            name = 'guidance' if guidance is self.guidance else f'guidance.{i}'
            found = guidance.losses(output, logits, aux_logits, task)
            losses |= add_prefix(found, name)
        return losses

    losses = loss
    """Another name of :meth:`loss`, for loops without MMEngine."""

    def _run(self, compute: Callable[[Tensor], Any], inputs: Tensor) -> Any:
        if self.step is not None:
            return self.step(compute, inputs)
        with self.recording():
            return compute(inputs)

    def compute(self, inputs: Tensor) -> tuple[Tensor, list]:
        """What a step computes from images (N, C, H, W) alone, while the taps
        are recorded: logits of F (N, K), and the output of each guidance."""
        logits, outputs = self.student(inputs), self.guide(inputs)
        self.release()
        return logits, outputs

    def student(self, inputs: Tensor) -> Tensor:
        """The logits of F, (N, K)."""
        features = self.architecture.extract_feat(inputs)
        return head_logits(self.architecture.head, features)

    def guide(self, inputs: Tensor) -> list:
        """The output of each guidance, from the taps and the images."""
        # all of them first: a guidance may run F again
        tapped = [recorder.outputs() for recorder in self.recorders]
        return [
            guidance({IMAGE: inputs, **outputs})
            for guidance, outputs in zip(self.guidances, tapped, strict=True)
        ]

    def _own_loss(
        self, inputs: Tensor, data_samples: list | None
    ) -> tuple[dict[str, Tensor], Tensor | None, list]:
        student, logits = own_loss(self.architecture, inputs, data_samples)
        outputs = self.guide(inputs)
        self.release()
        return student, logits, outputs

    def all_recorders(self) -> list[TapRecorder]:
        """Those of F, and those of the guidances, such as of a teacher."""
        return self.recorders + [
            recorder
            for guidance in self.guidances
            for recorder in guidance.recorders
        ]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While active, the outputs of tapped modules are kept."""
        with ExitStack() as stack:
            for recorder in self.all_recorders():
                stack.enter_context(recorder)
            yield

    def release(self) -> None:
        """Drop what was tapped: a compiled step would return it, and fill it
        with gradients of zero."""
        for recorder in self.all_recorders():
            recorder.release()

    def eager(self) -> Any:
        """A context without compiled or recorded steps: they call no hooks."""
        return nullcontext() if self.step is None else self.step.eager()

    # --- before the first step ----------------------------------------------

    def prepare(self) -> None:
        """Give teachers that are F its weights, which must be loaded."""
        for guidance in self.guidances:
            guidance.prepare(self.architecture)

    def calibrate(self, inputs: Tensor) -> None:
        """Set the scales of quantizers that have none, from a preprocessed
        batch (N, C, H, W), as the first call of :meth:`loss` does by itself.

        F runs in training mode, and then in evaluation mode for layers that
        only sometimes run; buffers and random numbers are as before.
        """
        network = self.architecture
        run = partial(self.student, inputs)
        if type(network).loss is not ImageClassifier.loss:
            run = partial(network, inputs, mode='tensor')
        set_scales(network, run)

    def _start(self, inputs: Tensor) -> None:
        self.prepare()
        if not self._float_start:
            build.warn_without_float_start(self.architecture)
        self.calibrate(inputs)
        self._started = True

    # --- weights -----------------------------------------------------------

    def train(self, mode: bool = True) -> 'JointQAT':
        """Set the mode; scales are trained in frozen stages, too."""
        super().train(mode)
        # mmpretrain freezes all parameters of a stage whenever it is called
        for _, quantizer in named_quantizers(self.architecture):
            quantizer.requires_grad_(True)
        return self

    def init_weights(self) -> None:
        """Initialise, then load ``float_checkpoint`` if there is one."""
        with initialising(self):
            super().init_weights()
        if self.float_checkpoint is not None:
            load_float(self.architecture, self.float_checkpoint)
            self._float_start = True

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Takes a training checkpoint, a slim one, and a float one; a
        UsageError if it is one of another architecture."""
        adapt_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._float_start = True


def add_prefix(losses: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """``losses`` with ``PREFIX.`` before each name."""
    return {f'{prefix}.{name}': value for name, value in losses.items()}
