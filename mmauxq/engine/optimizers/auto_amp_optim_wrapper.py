from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from mmengine.optim import OptimWrapper

from mmauxq.log import log
from mmauxq.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class AutoAmpOptimWrapper(OptimWrapper):
    """bfloat16 where the GPU computes it natively, float32 elsewhere.

    There it computes what ``AmpOptimWrapper`` of MMEngine does with
    ``dtype='bfloat16'`` and without a loss scale, which bfloat16 does not
    need: it has the exponent range of float32. Elsewhere it is MMEngine's
    ``OptimWrapper``. Its state is that of ``OptimWrapper`` in both cases, so
    that a run may be resumed in the other precision. The log says which one
    it is.

    Args:
        kwargs: For MMEngine's ``OptimWrapper``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # torch answers for any build for AMD's GPUs, also without one
        self.in_bfloat16 = (
            torch.cuda.is_available()
            and torch.cuda.is_bf16_supported(including_emulation=False)
        )
        if self.in_bfloat16:
            log_autocast('bfloat16')
        else:
            log(
                'Precision: float32, as no GPU here computes bfloat16 natively'
            )

    @contextmanager
    def optim_context(self, model: torch.nn.Module):
        cast = nullcontext()
        if self.in_bfloat16:
            cast = torch.autocast('cuda', dtype=torch.bfloat16)
        with super().optim_context(model), cast:
            yield


def log_autocast(dtype: str | torch.dtype) -> None:
    """Log that steps are computed in mixed precision, and how to avoid it."""
    name = str(dtype).removeprefix('torch.')
    log(
        f'Precision: {name} under autocast; --no-amp, or '
        'optim_wrapper.type=OptimWrapper, gives float32'
    )
