"""Joint training of a low-precision network and what guides it."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel, ModuleList
from mmengine.runner import CheckpointLoader
from mmpretrain.models import ClsHead, ImageClassifier, MultiLabelClsHead
from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.guidance import Guidance, Tap, TapRecorder, Taps, find_taps
from mmauxq.guidance.base import LOGITS
from mmauxq.guidance.taps import IMAGE
from mmauxq.layers import (
    LayerBits,
    convert,
    restore,
)
from mmauxq.layers.checkpoint import check_architecture, normalise
from mmauxq.quantizers import FLOAT_BITS, named_quantizers
from mmauxq.registry import MODELS

from . import dry_run
from .arguments import (
    assign_bits,
    build_architecture,
    check_sections,
    check_shape,
    check_taps,
)
from .step_forms import StepForms

LOW_BITS = 4
PLAIN_LOSSES = (ClsHead.loss, MultiLabelClsHead.loss)
"""``head.loss`` that is ``head._get_loss(head(features), data_samples)``."""


@MODELS.register_module()
class JointQAT(BaseModel):
    """Quantization-aware training of a classifier, with guidance.

    In mode ``loss`` the quantized network F runs once; its head gives
    ``student.*``, and what was tapped on the way gives ``guidance.*``. Both
    are summed by the runner and optimised together. In the modes ``predict``
    and ``tensor`` the guidance is not called.

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
        input_shape: (C, H, W) of the dry run that finds shapes and counts
            multiply-adds. The commands set it from the data of a recipe; by
            default it is what the backbone says, else 224 pixels.
        compile: Arguments of ``torch.compile`` for what a training step
            computes from tensors alone: F and its guidance, without the
            losses; ``True`` for its defaults, ``None`` for eager steps. The
            first step of a process is eager in any case.
        cuda_graph: Whether that same part is recorded as CUDA graphs, where
            there is a GPU; see :class:`.graphed_step.GraphedStep`. Batch
            norms then run as one with what follows them
            (:class:`mmauxq.layers.Chains`).
        memory: ``'codes'`` or ``'recompute'`` keeps less for the backward
            pass and computes it again, in eager steps with the same gradients
            to the bit; see :class:`mmauxq.layers.LessMemory`.
        channels_last: Whether feature maps lie in memory with their channels
            last, which the convolutions of a GPU prefer; ``None`` for where
            there is a GPU.
        data_preprocessor: Handed down to the architecture.

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
        compile: dict | bool | None = None,
        cuda_graph: bool = False,
        memory: str | None = None,
        channels_last: bool | None = None,
        data_preprocessor: dict | nn.Module | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        check_sections(architecture, quantizers, policy, guidance)
        architecture = build_architecture(architecture, data_preprocessor)
        super().__init__(architecture.data_preprocessor, init_cfg)
        self.architecture = architecture
        self.float_checkpoint = float_checkpoint
        self.guidance: Guidance | ModuleList | None = None
        self.recorders: list[TapRecorder] = []
        self._float_start = False
        self._started = False

        self.taps: list[Tap] = []
        shape = check_shape(input_shape) or dry_run.input_shape(architecture)
        inputs, found = dry_run.first_pass(architecture, shape)
        if not found.products:
            raise UsageError(
                'architecture: it has no convolution or linear layer that runs'
            )
        self.cost = dry_run.Cost(
            shape,
            found.num_classes,
            dry_run.count_parameters(architecture),
            found.multiply_adds,
        )
        self._log_cost('F', self.cost.parameters, self.cost.multiply_adds)
        if guidance is not None:
            several = isinstance(guidance, (list, tuple))
            built = [
                self._build_guidance(cfg, inputs)
                for cfg in (guidance if several else [guidance])
            ]
            self.guidance = ModuleList(built) if several else built[0]
            self._check_signals()
        self.bits = assign_bits(found, quantizers, policy)
        convert(
            architecture,
            self.bits,
            quantizers['weight'],
            quantizers['activation'],
            {p.name: p.readers for p in found.products.values()},
        )
        self._check_conversion(inputs)
        self._register_state_dict_hook(_keep_all)
        self._log_bits()
        if channels_last is None:
            channels_last = torch.cuda.is_available()
        self.channels_last = bool(channels_last)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)
        self.forms = StepForms(self, compile, cuda_graph, memory)

    def _check_conversion(self, inputs: Tensor) -> None:
        """See that every quantizer is reached; no layer is missed unsaid."""
        idle = dry_run.idle_layers(self.architecture, inputs)
        if idle:
            restore(self.architecture, idle)
        for name in idle:
            self.bits[name] = LayerBits(
                FLOAT_BITS, FLOAT_BITS, 'its product was not found'
            )

    def _build_guidance(self, cfg: dict, inputs: Tensor) -> Guidance:
        cfg = dict(cfg)
        kind = cfg.get('type')
        cls = MODELS.get(kind) if isinstance(kind, str) else kind
        if not (isinstance(cls, type) and issubclass(cls, Guidance)):
            raise UsageError(
                'guidance.type: expected mmauxq.AuxAdaptorAggregator, '
                'mmauxq.IntermediateClassifiers or '
                f'mmauxq.KnowledgeDistillation, got {kind!r}'
            )
        taps = cfg.pop('taps', cls.default_taps(cfg))
        found = Taps([], [], False)
        if taps is not None:
            check_taps(taps)
            found = find_taps(self.architecture, taps, cls.uses_stem, inputs)
        given = dict(
            taps=found.taps,
            head=self.architecture.head,
            num_classes=self.cost.num_classes,
        )
        if cls.uses_image:
            given.update(
                taps=[Tap(IMAGE, self.cost.shape), *found.taps],
                network=self.architecture,
                data_preprocessor=self.data_preprocessor,
            )
        guidance = MODELS.build(cfg, default_args=given)
        recorder = found.recorder(self.architecture)
        self.recorders.append(guidance.attach(self.architecture, recorder))
        parameters = dry_run.count_parameters(guidance)
        multiply_adds = dry_run.guidance_multiply_adds(
            guidance, found.taps, self.architecture, inputs
        )
        self.taps += found.taps
        self.cost.guidance_parameters += parameters
        self.cost.guidance_multiply_adds += multiply_adds
        self._log_cost(cls.__name__, parameters, multiply_adds, True)
        if found.taps:
            names = ', '.join(tap.name for tap in found.taps)
            print_log(f'JointQAT: taps {names}', logger='current')
        return guidance

    def _check_signals(self) -> None:
        """See that what one guidance needs of another is there, once."""
        gives = [g.gives for g in self.guidances if g.gives]
        for name in gives:
            if gives.count(name) > 1:
                raise UsageError(
                    f'guidance: {gives.count(name)} give {name}; allowed is '
                    'one auxiliary module'
                )
        for guidance in self.guidances:
            for name in guidance.needs:
                if name not in gives:
                    raise UsageError(
                        f'guidance: {type(guidance).__name__} needs {name}; '
                        'put a mmauxq.AuxAdaptorAggregator into the list'
                    )

    @property
    def guidances(self) -> list[Guidance]:
        """All of them, in the order of the config."""
        if self.guidance is None:
            return []
        if isinstance(self.guidance, Guidance):
            return [self.guidance]
        return list(self.guidance)

    def _log_cost(
        self,
        name: str,
        parameters: int,
        multiply_adds: int,
        relative: bool = False,
    ) -> None:
        more = ['', '']
        if relative:
            more = [
                f' (+{parameters / self.cost.parameters:.1%})',
                f' (+{multiply_adds / self.cost.multiply_adds:.1%})',
            ]
        note = ', in training only' if relative else ''
        print_log(
            f'JointQAT: {name} has {dry_run.with_unit(parameters)} parameters'
            f'{more[0]}, {dry_run.with_unit(multiply_adds)} multiply-adds'
            f'{more[1]} at {tuple(self.cost.shape)}{note}',
            logger='current',
        )

    def _log_bits(self) -> None:
        kept = [
            f'{name} ({bits.reason or "bits"})'
            for name, bits in self.bits.items()
            if bits.is_float
        ]
        widths: dict[tuple[int, int], int] = {}
        for bits in self.bits.values():
            if not bits.is_float:
                pair = (bits.weight, bits.activation)
                widths[pair] = widths.get(pair, 0) + 1
        counts = ', '.join(
            f'{count} layers at W{w}A{a}'
            for (w, a), count in sorted(widths.items())
        )
        print_log(
            f'JointQAT: {counts or "no layer quantized"}; '
            f'{len(kept)} float: {", ".join(kept) or "none"}',
            logger='current',
        )

    def train(self, mode: bool = True) -> 'JointQAT':
        """As of any module; scales are trained in frozen stages, too."""
        super().train(mode)
        # mmpretrain freezes all parameters of a stage whenever it is called
        for _, quantizer in named_quantizers(self.architecture):
            quantizer.requires_grad_(True)
        return self

    def init_weights(self) -> None:
        """Initialise, then load ``float_checkpoint`` if there is one."""
        super().init_weights()
        if self.float_checkpoint is None:
            return
        checkpoint = CheckpointLoader.load_checkpoint(
            self.float_checkpoint, map_location='cpu'
        )
        state = normalise(checkpoint, self.float_checkpoint)
        state = check_architecture(
            self.architecture, state, self.float_checkpoint, other_head=True
        )
        self.architecture.load_state_dict(state, strict=False)
        self._float_start = True

    def forward(
        self,
        inputs: Tensor,
        data_samples: list | None = None,
        mode: str = 'tensor',
    ) -> Any:
        """The losses of both, or what F alone gives.

        Args:
            inputs: (N, C, H, W).
            data_samples: N of them, with the targets in mode ``'loss'``.
            mode: ``'loss'`` for :meth:`loss`; ``'predict'`` and ``'tensor'``
                as of the architecture.
        """
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        return self.architecture(inputs, data_samples, mode=mode)

    def loss(
        self, inputs: Tensor, data_samples: list | None = None
    ) -> dict[str, Tensor]:
        """Losses of F and of its guidance.

        Args:
            inputs: (N, C, H, W).
            data_samples: With the targets, as mmpretrain's heads take them.

        Returns:
            ``student.*`` and ``guidance.*``; of a list of guidances
            ``guidance.0.*``, ``guidance.1.*``, ...
        """
        if self.channels_last and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        calibrates = self._start()
        if not self.is_plain:
            with self.forms.entered(calibrates):
                student, logits = self._other_loss(inputs, data_samples)
                found = self.guide(inputs)
                self.release()
        else:
            logits, found = self.forms(inputs, calibrates)
            student = self.architecture.head._get_loss(logits, data_samples)
        losses = add_prefix(student, 'student')
        signals = {LOGITS: logits}
        for guidance, mine in zip(self.guidances, found, strict=True):
            if guidance.gives:
                signals[guidance.gives] = mine
        for i, (guidance, mine) in enumerate(
            zip(self.guidances, found, strict=True)
        ):
            single = guidance is self.guidance
            losses.update(
                add_prefix(
                    guidance.losses(mine, signals, data_samples),
                    'guidance' if single else f'guidance.{i}',
                )
            )
        return losses

    @contextmanager
    def eager(self) -> Iterator[None]:
        """While entered, no step is compiled or recorded: hooks on modules
        inside of F see what passes."""
        with self.forms.eager():
            yield

    @property
    def is_plain(self) -> bool:
        """Whether the loss is that of the logits, and nothing else."""
        return (
            type(self.architecture).loss is ImageClassifier.loss
            and type(self.architecture.head).loss in PLAIN_LOSSES
        )

    def compute(self, inputs: Tensor) -> tuple[Tensor, list]:
        """The part of a step that is computed from tensors alone.

        Called by :class:`.step_forms.StepForms`, which has it compiled or
        recorded.

        Args:
            inputs: (N, C, H, W).

        Returns:
            The logits of F, (N, K), and what each guidance found.
        """
        found = self.student(inputs), self.guide(inputs)
        self.release()
        return found

    def student(self, inputs: Tensor) -> Any:
        """The logits of F, (N, K)."""
        return self._logits(self.architecture.extract_feat(inputs))

    def guide(self, inputs: Tensor) -> list:
        """What each guidance makes of what was tapped, and of the images."""
        # all of them first: a guidance may have F run again
        tapped = [recorder.outputs() for recorder in self.recorders]
        found = [
            guidance({IMAGE: inputs, **outputs})
            for guidance, outputs in zip(self.guidances, tapped, strict=True)
        ]
        return found

    def release(self) -> None:
        """Let go of what was tapped: the backward pass alone decides what
        lives. A compiled step would return, and fill with gradients of zero,
        what is kept."""
        for owner in (self, *self.guidances):
            for recorder in owner.recorders:
                recorder.release()

    def _logits(self, features: Any) -> Any:
        """Of the head.

        Heads with a second output for a teacher (LeViT, EfficientFormer)
        decline to train without one. The average that they predict with
        learns the targets, as in DeiTClsHead.
        """
        head = self.architecture.head
        try:
            return head(features)
        except NotImplementedError:
            training, head.training = head.training, False
            try:
                return head(features)
            finally:
                head.training = training

    def _other_loss(
        self, inputs: Tensor, data_samples: list | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The losses of F, and its logits if its head shows them."""
        architecture, logits = self.architecture, []
        handle = architecture.head.register_forward_hook(
            lambda module, args, output: logits.append(output)
        )
        try:
            losses = self._own_loss(inputs, data_samples)
        finally:
            handle.remove()
        return losses, logits[-1] if logits else None

    def _own_loss(
        self, inputs: Tensor, data_samples: list | None
    ) -> dict[str, Tensor]:
        architecture = self.architecture
        if type(architecture).loss is not ImageClassifier.loss:
            return architecture(inputs, data_samples, mode='loss')
        features = architecture.extract_feat(inputs)
        try:
            return architecture.head.loss(features, data_samples)
        except NotImplementedError:
            return ClsHead._get_loss(
                architecture.head, self._logits(features), data_samples
            )

    def prepare(self) -> None:
        """Before the first step: teachers that are F take its weights."""
        for guidance in self.guidances:
            guidance.prepare(self.architecture)

    def _start(self) -> bool:
        """Before a training step; returns whether it shall calibrate."""
        if self._started:
            return False
        self._started = True
        self.prepare()
        quantizers = [q for _, q in named_quantizers(self.architecture)]
        if all(bool(q.calibrated) for q in quantizers):
            return False
        lowest = min(q.bits for q in quantizers)
        if lowest <= LOW_BITS and not self._has_float_start():
            print_log(
                f'JointQAT: starting {lowest}-bit training WITHOUT A FLOAT '
                'CHECKPOINT. Low-bit networks trained from random weights end '
                'well below those that start from a trained float network: '
                'set model.float_checkpoint (or load_from)',
                logger='current',
                level=logging.WARNING,
            )
        return True

    def _has_float_start(self) -> bool:
        pretrained = any(
            isinstance(init, dict) and init.get('type') == 'Pretrained'
            for module in (self.architecture, self.architecture.backbone)
            for init in _as_list(getattr(module, 'init_cfg', None))
        )
        return self._float_start or pretrained

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Takes a training checkpoint, a slim one, and a float one.

        Raises:
            UsageError: If it is one of another architecture.
        """
        inner = f'{prefix}architecture.'
        if not any(key.startswith(inner) for key in state_dict):
            for key in [k for k in state_dict if k.startswith(prefix)]:
                state_dict[inner + key[len(prefix) :]] = state_dict.pop(key)
        if self.guidance is None:
            for key in [
                k for k in state_dict if k.startswith(f'{prefix}guidance.')
            ]:
                del state_dict[key]
        check_architecture(
            self.architecture,
            {
                key[len(inner) :]: value
                for key, value in state_dict.items()
                if key.startswith(inner)
            },
            'checkpoint',
        )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._float_start = True


def _keep_all(model: JointQAT, state: dict, prefix: str, _: Any) -> None:
    """State-dict hook: put back what a module of the architecture left out.

    MMPretrain's LoRA keeps only the low-rank weights, because the others can
    be had from the float checkpoint; the scales of the quantizers cannot.
    """
    for path, module in model.named_modules():
        inner = f'{prefix}{path}.' if path else prefix
        own = dict(module._parameters) | {
            name: buffer
            for name, buffer in module._buffers.items()
            if name not in module._non_persistent_buffers_set
        }
        for name, tensor in own.items():
            if tensor is not None:
                state.setdefault(inner + name, tensor.detach())


def add_prefix(losses: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """``losses`` with ``PREFIX.`` before each name."""
    return {f'{prefix}.{name}': value for name, value in losses.items()}


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]
