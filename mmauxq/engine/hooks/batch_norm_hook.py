import copy
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import CheckpointHook, Hook
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmauxq.errors import UsageError, check_integer
from mmauxq.log import log
from mmauxq.registry import HOOKS

from ..running import bare_model, seed_step


@torch.no_grad()
def reestimate_batch_norm(
    architecture: nn.Module, batches: Iterable[Tensor]
) -> int:
    """Recompute running means and variances, weights as they are.

    During training they trail behind weights that still move, which costs a
    2-bit network accuracy. Here they are the plain average over the batches,
    and over the ranks. Everything but the batch norms is in evaluation mode.

    Args:
        architecture: The buffers of its batch norms are changed.
        batches: Preprocessed images, (N, C, H, W), of this rank; more than
            one value per channel.

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
        raise UsageError('batch norm: expected at least one batch, got none')
    for norm in norms:  # over all ranks, by the law of total variance
        mean, variance = norm.running_mean, norm.running_var
        own = mean.clone()
        dist.all_reduce(mean, op='mean')
        variance += (own - mean) ** 2
        dist.all_reduce(variance, op='mean')
    return count


@HOOKS.register_module()
class BatchNormHook(Hook):
    """Re-estimates batch-norm statistics before the last checkpoint is saved.

    A run that another hook stops early is saved and validated once more.

    Args:
        batches: Number of training batches, from 1.
    """

    # Scales are positive by then (QuantizerWatchHook), and averages of the
    # weights (EMAHook) are not yet updated.
    priority = 45

    def __init__(self, batches: int = 50) -> None:
        check_integer('BatchNormHook: batches', batches, 1)
        self.batches = batches

    def after_train_iter(self, runner: Any, *step: Any, **more: Any) -> None:
        if self.is_last_train_iter(runner):
            self._reestimate(runner, runner.iter + 1)

    def after_train(self, runner: Any) -> None:
        """Where training was stopped, after the checkpoint was saved."""
        stopped = runner.train_loop.stop_training
        if not stopped or runner.iter == runner.max_iters:
            return
        self._reestimate(runner, runner.iter)
        meta = dict(epoch=runner.epoch, iter=runner.iter)
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook):
                step = meta['epoch' if hook.by_epoch else 'iter']
                hook._save_checkpoint_with_step(runner, step, meta)
        if runner.val_loop is not None:
            runner.val_loop.run()

    def _reestimate(self, runner: Any, step: int) -> None:
        model = bare_model(runner)
        # a copy: the loop may still take batches from the loader itself
        loader = copy.copy(runner.train_dataloader)
        loader._iterator = None
        # a resumed run draws the same images
        seed_step(runner.seed, step)
        images = (
            model.data_preprocessor(data, False)['inputs']
            for data in itertools.islice(loader, self.batches)
        )
        count = reestimate_batch_norm(model.architecture, images)
        log(f'BatchNormHook: statistics of {count} batches')
