"""The options of ``model.speed``."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from mmauxq.errors import UsageError, unknown_name

from .recompute import LEVELS


@dataclass
class Speed:
    """How a training step is run. All forms compute the same step.

    Args:
        compile: Arguments of ``torch.compile`` for what a step computes from
            tensors alone: F and its guidance, without the losses. ``True``
            for its defaults, ``None`` for eager steps. The first step of a
            process is eager in any case.
        cuda_graph: Whether that same part is recorded as CUDA graphs; see
            :class:`.cuda_graph.GraphedStep`. Batch norms are then fused with
            what follows them; see :class:`.fused_norm.FusedBatchNorms`.
        memory: ``'codes'`` or ``'recompute'`` keeps less for the backward
            pass and computes it again, in eager and recorded steps with the
            same gradients to the bit; see :class:`.recompute.Recompute`.
        channels_last: Whether feature maps lie in memory with their channels
            last, which the convolutions of a GPU prefer; ``None`` for where
            there is a GPU.

    Attributes:
        auto: Whether nobody chose this form. A step that cannot be recorded
            is then launched kernel by kernel instead of refused.

    Raises:
        UsageError: If a value is none of these.
    """

    compile: dict | bool | None = None
    cuda_graph: bool = False
    memory: str | None = None
    channels_last: bool | None = None
    auto: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for name in ('cuda_graph', 'channels_last'):
            value = getattr(self, name)
            if not isinstance(value, bool) and (
                value is not None or name == 'cuda_graph'
            ):
                raise UsageError(
                    f'model.speed.{name}: expected True or False, got '
                    f'{value!r}'
                )
        if self.memory is not None and self.memory not in LEVELS:
            raise UsageError(
                f'model.speed.memory: expected one of {list(LEVELS)} or None, '
                f'got {self.memory!r}'
            )
        if self.compile and self.cuda_graph:
            raise UsageError(
                'model.speed: expected cuda_graph or compile, got both; '
                "compile=dict(mode='reduce-overhead') compiles and records"
            )
        if not isinstance(self.compile, (Mapping, bool, type(None))):
            raise UsageError(
                'model.speed.compile: expected True, False or arguments of '
                f'torch.compile, got {self.compile!r}'
            )

    @classmethod
    def from_config(cls, config: Any) -> 'Speed':
        """From ``None``, ``'auto'`` or a dict.

        ``None`` and ``'auto'`` record the step where there is a GPU.

        Raises:
            UsageError: If it has an unknown key or value.
        """
        if config is None or config == 'auto':
            speed = cls(cuda_graph=torch.cuda.is_available())
            speed.auto = True
            return speed
        if not isinstance(config, Mapping):
            raise UsageError(
                "model.speed: expected 'auto', 'eager' or a dict, got "
                f'{config!r}'
            )
        names = [each.name for each in fields(cls) if each.init]
        options = {k: v for k, v in config.items() if k != '_scope_'}
        for key in options:
            if key not in names:
                raise unknown_name('model.speed', key, names)
        return cls(**options)
