"""A second pass through F, with auxiliary batch norms."""

import copy

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from mmauxq.errors import UsageError
from mmauxq.quantizers.base import flag

from .taps import TapRecorder


class AuxiliaryBN(nn.Module):
    """Runs F's backbone again, with copies of its batch norms.

    Everything else belongs to F and learns from both passes. Affine
    parameters and running statistics are copied before the first step.

    Sources: the first version of the auxiliary module's paper,
    arXiv:1903.11236v1; auxiliary batch norms: Xie et al., AdvProp,
    arXiv:1911.09665.

    Args:
        network: F; not registered as a child. Its backbone has batch norms.
        recorder: Of what is read, inside of the backbone. It is entered
            together with that of F.
    """

    def __init__(self, network: nn.Module, recorder: TapRecorder) -> None:
        super().__init__()
        outside = [n for n in recorder.names if not n.startswith('backbone.')]
        if outside:
            raise UsageError(
                'guidance.separate_bn: expected taps inside of the backbone, '
                f'got {outside}'
            )
        self._network, self.recorder = [network], recorder
        norms = {
            name: copy.deepcopy(module)
            for name, module in network.backbone.named_modules()
            if isinstance(module, _BatchNorm)
        }
        if not norms:
            raise UsageError(
                'guidance.separate_bn: expected a backbone with batch norms, '
                f'got a {type(network.backbone).__name__}; set it to False'
            )
        self.names = list(norms)
        self.norms = nn.ModuleList(norms.values())
        self.register_buffer('ready', flag(False))

    def prepare(self) -> None:
        """Copy F's batch norms, unless this was done."""
        if self.ready:
            return
        for name, norm in zip(self.names, self.norms, strict=True):
            source = self._network[0].backbone.get_submodule(name)
            norm.load_state_dict(source.state_dict())
        self.ready.fill_(1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Name of a tap -> its tensor in a pass of images (N, C, H, W)."""
        self.recorder.restart()
        tensors = {
            f'{name}.{key}': tensor
            for name, norm in zip(self.names, self.norms, strict=True)
            for key, tensor in (*norm.named_parameters(),
                                *norm.named_buffers())
        }  # fmt: skip
        functional_call(self._network[0].backbone, tensors, (images,))
        return self.recorder.outputs()
