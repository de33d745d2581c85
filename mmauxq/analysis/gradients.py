"""How much gradient reaches each block."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmauxq.guidance import find_taps
from mmauxq.guidance.auxiliary_bn import AuxiliaryBN
from mmauxq.network import TrainingPass, sample_images
from mmauxq.network.profile import floating

if TYPE_CHECKING:
    from mmauxq.algorithms import JointQAT


def block_gradient_norms(
    model: 'JointQAT', inputs: Tensor, data_samples: list
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
    with floating(network):
        run = TrainingPass(network, sample_images(network, model.cost.shape))
    taps = find_taps(run, 'auto')
    model.calibrate(inputs)
    passes: list[dict[str, Tensor]] = []

    def next_pass(*_: object) -> None:
        passes.append(recorder.outputs())
        recorder.restart()

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, AuxiliaryBN):
                stack.enter_context(
                    module.register_forward_pre_hook(next_pass)
                )
        stack.enter_context(model.eager())
        recorder = stack.enter_context(taps.recorder(network))
        losses = model(inputs, data_samples, mode='loss')
        passes.append(recorder.outputs())
    terms = {key: value for key, value in losses.items() if 'loss' in key}
    student = [v for key, v in terms.items() if key.startswith('student.')]
    sums = {'student': sum(student)}
    if model.guidance is not None:
        sums['joint'] = sum(terms.values())
    outputs = [pair for outputs in passes for pair in outputs.items()]
    norms = {}
    for name, loss in sums.items():
        gradients = torch.autograd.grad(
            loss,
            [tensor for _, tensor in outputs],
            retain_graph=True,
            allow_unused=True,  # the loss of F depends on its own pass only
        )
        total: dict[str, Tensor] = {}
        for (block, _), gradient in zip(outputs, gradients, strict=True):
            if gradient is not None:
                total[block] = total.get(block, 0) + gradient
        norms[name] = {block: g.norm().item() for block, g in total.items()}
    return norms
