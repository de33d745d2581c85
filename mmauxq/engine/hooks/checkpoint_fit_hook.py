"""Whether a checkpoint fills the network that it is loaded into."""

from typing import Any

from mmengine.hooks import Hook

from mmauxq.errors import UsageError
from mmauxq.network.checkpoint import check_scales, normalise

from ..running import bare_model


class CheckpointFitHook(Hook):
    """Refuses a checkpoint that leaves part of the network unset.

    MMEngine only warns, and would evaluate random weights.

    Args:
        path: Of the checkpoint, for the message.
    """

    priority = 'LOWEST'

    def __init__(self, path: str) -> None:
        self.path = path

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Compare the checkpoint with the network.

        Raises:
            UsageError: If an entry of the network is missing in the
                checkpoint, or has another shape or kind of number; or one of
                the two is quantized and the other is not.
        """
        model = bare_model(runner)
        state = checkpoint.get('state_dict', checkpoint)
        state = {k.removeprefix('module.'): v for k, v in state.items()}
        try:
            missing = model.load_state_dict(state, False).missing_keys
        except RuntimeError as error:
            detail = str(error).split('\n')[1:2] or [str(error)]
            raise UsageError(self._other(detail[0].strip())) from error
        wrong = [
            f'{key}: expected {value.dtype}, got {state[key].dtype}'
            for key, value in model.state_dict().items()
            if key in state
            and state[key].is_floating_point() != value.is_floating_point()
        ]
        if wrong:
            raise UsageError(self._other(wrong[0]))
        # Some backbones drop, as they load, what they compute anew.
        state |= {f'architecture.{k}': v for k, v in state.items()}
        missing = [
            k
            for k in missing
            if 'num_batches_tracked' not in k
            and '_quantizer.' not in k
            and k not in state
        ]
        if missing:
            raise UsageError(
                self._other(
                    f'{len(missing)} entries are missing, such as '
                    f'{", ".join(missing[:3])}'
                )
            )
        check_scales(
            getattr(model, 'architecture', model),
            normalise(checkpoint, self.path),
            self.path,
        )

    def _other(self, detail: str) -> str:
        return f'checkpoint {self.path} is of another architecture: {detail}'
