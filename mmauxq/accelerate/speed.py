"""The options of ``model.speed``."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mmauxq.errors import UsageError, check_choice

from .recompute import LEVELS


@dataclass
class Speed:
    """How a training step is run. All forms compute the same step.

    Args:
        compile: Arguments of ``torch.compile`` for what a step computes from
            tensors alone: F and its guidance, without the losses. ``True``
            for its defaults. The first step of a process is eager in any
            case.
        cuda_graph: Whether that same part is recorded as CUDA graphs; see
            :class:`.cuda_graph.GraphedStep`. Batch norms are then fused with
            what follows them; see :class:`.fused_norm.FusedBatchNorms`.
            ``True`` ends a run whose step cannot be recorded. ``None`` lets
            such a step be launched kernel by kernel, and first compiles
            networks without batch norms, which is faster for them.
        memory: ``'codes'`` or ``'recompute'`` keeps less for the backward
            pass and computes it again, in eager and recorded steps with the
            same gradients to the bit; see :class:`.recompute.Recompute`.
        channels_last: Whether feature maps lie in memory with their channels
            last, which the convolutions of a GPU prefer; ``None`` for where
            there is a GPU.

    Raises:
        UsageError: If a value is none of these.
    """

    compile: dict | bool | None = None
    cuda_graph: bool | None = None
    memory: str | None = None
    channels_last: bool | None = None

    def __post_init__(self) -> None:
        for name in ('cuda_graph', 'channels_last'):
            value = getattr(self, name)
            if not isinstance(value, (bool, type(None))):
                raise UsageError(
                    f'model.speed.{name}: expected True, False or None, got '
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

    @property
    def auto(self) -> bool:
        """Whether the form of the step is left to this package."""
        return self.cuda_graph is None and not self.compile

    @classmethod
    def from_config(cls, config: Any) -> 'Speed':
        """From ``None``, ``'auto'`` or a dict.

        Raises:
            UsageError: If it has an unknown key or value.
        """
        if config is None or config == 'auto':
            return cls()
        if not isinstance(config, Mapping):
            raise UsageError(
                "model.speed: expected 'auto', 'eager' or a dict, got "
                f'{config!r}'
            )
        names = [field.name for field in fields(cls)]
        options = {k: v for k, v in config.items() if k != '_scope_'}
        for key in options:
            check_choice('model.speed', key, names)
        return cls(**options)
