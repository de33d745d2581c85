"""How much gradient reaches each block."""

import torch
from torch import Tensor

from mmauxq.algorithms import JointQAT, dry_run
from mmauxq.guidance import find_taps
from mmauxq.guidance.own_norms import OwnNorms


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
        gradient at its output; of the sum, if guidance runs F once more.
    """
    network = model.architecture
    with dry_run.floating(network):
        found = find_taps(
            network, 'auto', False, dry_run.sample(network, model.cost.shape)
        )
    passes: list[dict[str, Tensor]] = []

    def next_pass(*_: object) -> None:
        passes.append(recorder.outputs())
        recorder.restart()

    handles = [
        module.register_forward_pre_hook(next_pass)
        for module in model.modules()
        if isinstance(module, OwnNorms)
    ]
    try:
        with model.eager(), found.recorder(network) as recorder:
            losses = model(inputs, data_samples, mode='loss')
        passes.append(recorder.outputs())
    finally:
        for handle in handles:
            handle.remove()
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
            sum(values),
            [tensor for outputs in passes for tensor in outputs.values()],
            retain_graph=True,
            allow_unused=True,  # the loss of F knows its own pass only
        )
        blocks = [block for outputs in passes for block in outputs]
        total: dict[str, Tensor] = {}
        for block, gradient in zip(blocks, gradients, strict=True):
            if gradient is not None:
                total[block] = total.get(block, 0) + gradient
        norms[name] = {block: g.norm().item() for block, g in total.items()}
    return norms
