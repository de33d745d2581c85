from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper

from mmauxq.errors import UsageError, check_choice
from mmauxq.registry import OPTIM_WRAPPERS

from .auto_amp_optim_wrapper import log_autocast


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(AmpOptimWrapper):
    """Mixed precision on the CPU.

    MMEngine's ``AmpOptimWrapper`` refuses to be built without a GPU.

    Args:
        loss_scale: ``'dynamic'``, a number that stays, or arguments of
            ``torch.amp.GradScaler``. bfloat16 has the exponent range of
            float32; nothing is scaled there under ``'dynamic'``.
        dtype: ``'bfloat16'``, torch's default on a CPU, or ``'float16'``.
        kwargs: For MMEngine's ``OptimWrapper``.

    Raises:
        UsageError: If ``dtype`` is another one, or ``loss_scale`` neither.
    """

    def __init__(
        self,
        loss_scale: str | float | dict = 'dynamic',
        dtype: str = 'bfloat16',
        **kwargs: Any,
    ) -> None:
        known = ('bfloat16', 'float16')
        check_choice('CPUAmpOptimWrapper: dtype', dtype, known)
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param = None
        if loss_scale == 'dynamic':
            settings = dict(enabled=dtype == 'float16')
        elif isinstance(loss_scale, dict):
            settings = loss_scale
        elif type(loss_scale) in (int, float) and loss_scale > 0:
            self._scale_update_param = float(loss_scale)
            settings = dict(init_scale=float(loss_scale))
        else:
            raise UsageError(
                "CPUAmpOptimWrapper: loss_scale: expected 'dynamic', a "
                'positive number or arguments of GradScaler, got '
                f'{loss_scale!r}'
            )
        self.loss_scaler = torch.amp.GradScaler('cpu', **settings)
        self.cast_dtype = getattr(torch, dtype)
        log_autocast(dtype)

    @contextmanager
    def optim_context(self, model: torch.nn.Module):
        with (
            OptimWrapper.optim_context(self, model),
            torch.autocast('cpu', dtype=self.cast_dtype),
        ):
            yield
