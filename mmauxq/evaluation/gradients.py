"""How much gradient reaches each block."""

import torch
from torch import Tensor

from mmauxq.algorithms import JointQAT, dry_run
from mmauxq.guidance import find_taps


def block_gradient_norms(
    model: JointQAT, inputs: Tensor, data_samples: list
) -> dict[str, dict[str, float]]:
    """Norm of the gradient at the output of every block, by loss.

    Args:
        model: In training mode; its parameters and their gradients are left
            as they were, batch-norm statistics move by one step.
        inputs: (N, C, H, W), preprocessed.
        data_samples: With the targets.

    Returns:
        ``'student'`` (the loss of F alone) and, if there is guidance,
        ``'joint'`` (both losses) -> name of a block -> Euclidean norm of the
        gradient at its output.
    """
    network = model.architecture
    with dry_run.floating(network):
        found = find_taps(
            network, 'auto', False, dry_run.sample(network, model.cost.shape)
        )
    with model.eager(), found.recorder(network) as recorder:
        losses = model(inputs, data_samples, mode='loss')
    outputs = recorder.outputs()
    terms = {
        'student': [
            v
            for k, v in losses.items()
            if k.startswith('student.') and 'loss' in k
        ],
        'joint': [v for k, v in losses.items() if 'loss' in k],
    }
    if model.guidance is None:
        del terms['joint']
    norms = {}
    for name, values in terms.items():
        gradients = torch.autograd.grad(
            sum(values), list(outputs.values()), retain_graph=True
        )
        norms[name] = {
            block: gradient.norm().item()
            for block, gradient in zip(outputs, gradients, strict=True)
        }
    return norms
