"""A second pass through F, with auxiliary batch norms."""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from mmauxq.errors import UsageError
from mmauxq.quantizers.base import flag

from .taps import TapRecorder


class AuxiliaryBN(nn.Module):
    """Runs F's backbone again, sharing all of it except the batch norms.

    Quantized convolutions, their scales and everything else belong to F, and
    learn from both passes. Affine parameters and running statistics of the
    batch norms are copies, made from F before the first step.

    Sources: the first version of the auxiliary module's paper,
    arXiv:1903.11236v1; auxiliary batch norms: Xie et al., AdvProp,
    arXiv:1911.09665.

    Args:
        network: F; not registered as a child.
        recorder: Of what is read. It is entered together with that of F.

    Raises:
        UsageError: If the backbone has no batch norm, or something outside
            of the backbone is read.
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
        norms = self._norms_of_f()
        if not norms:
            raise UsageError(
                'guidance.separate_bn: expected a backbone with batch norms, '
                f'got a {type(network.backbone).__name__}; set it to False'
            )
        self.names = list(norms)
        self.norms = nn.ModuleList(map(copy.deepcopy, norms.values()))
        self.register_buffer('ready', flag(False))

    def _norms_of_f(self) -> dict[str, nn.Module]:
        return {
            name: module
            for name, module in self._network[0].backbone.named_modules()
            if isinstance(module, _BatchNorm)
        }

    def prepare(self) -> None:
        """Copy F's batch norms, unless this was done."""
        if self.ready:
            return
        norms = self._norms_of_f()
        with torch.no_grad():
            for name, norm in zip(self.names, self.norms, strict=True):
                norm.load_state_dict(norms[name].state_dict())
            self.ready.fill_(1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Name of a tap -> its tensor in the second pass.

        Args:
            images: (N, C, H, W), preprocessed.
        """
        self.recorder.restart()
        tensors = {
            f'{name}.{key}': tensor
            for name, norm in zip(self.names, self.norms, strict=True)
            for key, tensor in (*norm.named_parameters(),
                                *norm.named_buffers())
        }  # fmt: skip
        functional_call(self._network[0].backbone, tensors, (images,))
        return self.recorder.outputs()
