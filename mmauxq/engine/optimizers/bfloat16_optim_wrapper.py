from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper

from mmauxq.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16 on the CPU, without a loss scaler.

    MMEngine's ``AmpOptimWrapper`` refuses to be built without a GPU.
    bfloat16 has the exponent range of float32, so nothing is scaled.
    """

    @contextmanager
    def optim_context(self, model: torch.nn.Module):
        with (
            super().optim_context(model),
            torch.autocast('cpu', dtype=torch.bfloat16),
        ):
            yield
