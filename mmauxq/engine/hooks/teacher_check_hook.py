from collections.abc import Iterable
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook

from mmauxq.errors import UsageError
from mmauxq.guidance import Taught
from mmauxq.log import log
from mmauxq.registry import HOOKS

from ..running import bare_model


@HOOKS.register_module()
class TeacherCheckHook(Hook):
    """Prints the accuracy of each teacher before training, or refuses it.

    No loss shows that a teacher has the wrong weights or data preprocessor.
    ``mmauxq train`` and ``mmauxq compare`` register the hook; without a
    teacher it does nothing.

    Args:
        batches: Validation batches in each process; ``None`` for all.

    Raises:
        UsageError: If a teacher has less than its ``least_accuracy``.
    """

    priority = 'LOW'

    def __init__(self, batches: int | None = None) -> None:
        self.batches = batches

    def before_train(self, runner: Any) -> None:
        model = bare_model(runner)
        for guidance in getattr(model, 'guidances', []):
            if isinstance(guidance, Taught):
                model.prepare()
                self._check(model, guidance, runner.val_loop)

    def _check(self, model: Any, guidance: Any, val_loop: Any) -> None:
        if val_loop is None:
            _log(guidance, 'not checked, no validation data')
            return
        # the order of the training data must not depend on the check
        with torch.random.fork_rng(), torch.no_grad():
            right, count = self._count(model, guidance, val_loop.dataloader)
        if not count:
            _log(guidance, 'not checked, no single labels')
            return
        accuracy = 100 * right / count
        got = f'top-1 {accuracy:.2f} on {count} validation images'
        _log(guidance, f'has {got}')
        if accuracy < guidance.least_accuracy and not guidance.untrained:
            raise UsageError(
                f'guidance.teacher: {guidance.title}: expected top-1 of at '
                f'least guidance.least_accuracy={guidance.least_accuracy:g}, '
                f'got {got}; are its checkpoint and its data_preprocessor '
                'the right ones?'
            )

    def _count(
        self, model: Any, guidance: Any, loader: Iterable
    ) -> tuple[int, int]:
        network = guidance.teacher.network
        training, right, count = network.training, 0, 0
        network.eval()
        for i, batch in enumerate(loader):
            if i == self.batches:
                break
            batch = model.data_preprocessor(batch, False)
            guidance.check_size(batch['inputs'].shape[-1])
            labels = [s.get('gt_label') for s in batch['data_samples']]
            if any(label is None or label.numel() != 1 for label in labels):
                continue
            answers = guidance.teacher(batch['inputs'])[0].argmax(1)
            right += int((answers == torch.cat(labels).to(answers)).sum())
            count += len(labels)
        network.train(training)
        total = torch.tensor([right, count], device=guidance.ready.device)
        dist.all_reduce(total)
        return tuple(total.tolist())


def _log(guidance: Taught, text: str) -> None:
    name = type(guidance).__name__
    log(f'{name}: the teacher, {guidance.title}: {text}')
