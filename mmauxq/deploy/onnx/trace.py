"""From PyTorch to an ONNX graph in which every quantizer is one node."""

import copy
import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmauxq.errors import UsageError, one_line
from mmauxq.optional import need
from mmauxq.quantizers import named_quantizers

if TYPE_CHECKING:
    import onnx_ir

DOMAIN = 'mmauxq'
INPUT, OUTPUT = 'images', 'logits'
OPSET = 21


class _Placeholder(nn.Module):
    """Stands in the graph for the quantizer of that name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f'{DOMAIN}::Quantizer',
            (x,),
            dict(name=self.name),
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )


class Logits(nn.Module):
    """From images (N, C, H, W) to :func:`logits_of` a classifier."""

    def __init__(self, architecture: nn.Module) -> None:
        super().__init__()
        self.architecture = architecture

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.architecture, images)


def logits_of(architecture: nn.Module, images: Tensor) -> Tensor:
    """What the exported graph computes, (N, K)."""
    logits = architecture(images, mode='tensor')
    return logits[0] if isinstance(logits, (tuple, list)) else logits


def trace(architecture: nn.Module, shape: Sequence[int]) -> 'onnx_ir.Model':
    """The graph of a classifier, with its quantizers as ``mmauxq::Quantizer``,
    from ``images`` (batch, C, H, W) of this ``shape`` (C, H, W) to ``logits``
    (batch, K).

    Raises:
        UsageError: If PyTorch cannot express the network in ONNX.
    """
    need('onnx', 'onnxscript')
    from onnx_ir.passes import common

    names = [name for name, _ in named_quantizers(architecture)]
    architecture = copy.deepcopy(architecture).cpu().eval()
    for name in names:
        architecture.set_submodule(name, _Placeholder(name))
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter tells about itself
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            program = torch.onnx.export(
                Logits(architecture).eval(),
                (torch.zeros(2, *shape),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim('batch')},),
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever went wrong
        reason = one_line(error.__cause__ or error)
        raise UsageError(
            f'PyTorch cannot express this network in ONNX ({reason})'
        ) from error
    finally:
        logging.disable(disabled)
    common.LiftConstantsToInitializersPass(size_limit=0)(program.model)
    return program.model
