"""Batch-norm statistics of the network that ships."""

from collections.abc import Iterable

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmauxq.errors import UsageError
from mmauxq.registry import HOOKS

from ..running import bare_model


@torch.no_grad()
def reestimate_batch_norm(
    architecture: nn.Module, batches: Iterable[Tensor]
) -> int:
    """Recompute running means and variances, weights as they are.

    During training the statistics trail behind weights that still move, and a
    2-bit network feels it. Here they are the plain average over the batches.
    Everything but the batch norms stays in evaluation mode.

    Args:
        architecture: Changed: the buffers of its batch norms.
        batches: Preprocessed images, (N, C, H, W), more than one value per
            channel.

    Returns:
        Number of batches.

    Raises:
        UsageError: If there is no batch; the statistics are then as before.
    """
    norms = [
        m
        for m in architecture.modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    ]
    modes = [(m, m.training) for m in architecture.modules()]
    momenta = [norm.momentum for norm in norms]
    architecture.eval()
    count = 0
    try:
        for images in batches:
            if not count:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # the plain average
                    norm.train()
            architecture(images, mode='tensor')
            count += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    if not count:
        raise UsageError('batch norm: there is no batch to estimate it from')
    for norm in norms:
        for buffer in (norm.running_mean, norm.running_var):
            if dist.get_world_size() > 1:
                dist.all_reduce(buffer, op='mean')
    return count


@HOOKS.register_module()
class BatchNormHook(Hook):
    """Re-estimates batch-norm statistics after the last training epoch.

    Runs before that epoch's checkpoint is saved and validated.

    Args:
        batches: Number of training batches, from 1.
    """

    priority = 'HIGH'

    def __init__(self, batches: int = 50) -> None:
        if not isinstance(batches, int) or batches < 1:
            raise UsageError(
                f'BatchNormHook: batches={batches!r}; allowed are integers '
                'from 1'
            )
        self.batches = batches

    def after_train_epoch(self, runner) -> None:
        """At the last epoch."""
        if runner.epoch + 1 < runner.max_epochs:
            return
        model = bare_model(runner)

        def images() -> Iterable[Tensor]:
            for i, data in enumerate(runner.train_dataloader):
                if i == self.batches:
                    return
                yield model.data_preprocessor(data, False)['inputs']

        count = reestimate_batch_norm(model.architecture, images())
        print_log(
            f'BatchNormHook: statistics of {count} batches', logger='current'
        )
