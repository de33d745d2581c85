from typing import Any

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel

from mmauxq.network.checkpoint import (
    check_architecture,
    check_same_bits,
    check_scales,
    is_joint,
    normalise,
)

from ..running import bare_model


class CheckpointFitHook(Hook):
    """Refuses a checkpoint that leaves part of the network unset.

    MMEngine only warns, and would evaluate random weights.

    Args:
        path: Of the checkpoint, for the message.
        trained: Whether the checkpoint must be as quantized as the network,
            as for a test; else it may be a float one to start from.

    Raises:
        UsageError: If an entry of the network is missing in the checkpoint,
            or has another shape or kind of number; or one of the two is
            quantized and the other is not.
    """

    priority = 'LOWEST'

    def __init__(self, path: str, trained: bool = True) -> None:
        self.path, self.trained = path, trained

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        model = bare_model(runner)
        while isinstance(model, BaseTTAModel):
            model = model.module
        network = getattr(model, 'architecture', model)
        state = normalise(checkpoint, self.path)
        loaded = checkpoint.get('state_dict', checkpoint)
        if network is model and is_joint(loaded):
            state = loaded  # a plain classifier takes its names as they are
        check_architecture(network, state, self.path)
        if not self.trained:
            return
        check_scales(network, state, self.path)
        check_same_bits(network, checkpoint.get('meta'), self.path)
