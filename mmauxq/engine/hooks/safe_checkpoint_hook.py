"""Checkpoints that replace good ones only when they are complete."""

import inspect
import os
from typing import Any

from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import CheckpointHook

from mmauxq.errors import TrainingError, UsageError, check_integer
from mmauxq.files import write_atomically
from mmauxq.network.checkpoint import bits_of, check_same_bits
from mmauxq.registry import HOOKS

from ..resume import GRADIENTS
from ..running import bare_model
from ..training_state import checkpoint_name, plain


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """MMEngine's hook, but a complete checkpoint exists at every moment.

    * An old checkpoint, and the old best one, is deleted after the new one
      is written, not before.
    * ``last_checkpoint`` is complete or absent, and names a complete file.
    * The checkpoint of an epoch is written again if validation finds it the
      best, also where validation is the first thing that a resumed run does.
    * Gradients that wait for a step (``accumulative_counts``) are stored, if
      there is one process; MMEngine loses them.

    Args: as of MMEngine's ``CheckpointHook``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        known = set(inspect.signature(CheckpointHook).parameters) - {'kwargs'}
        unknown = sorted(set(kwargs) - known)
        if unknown:  # MMEngine hands them on, and fails as it saves
            raise UsageError(
                f'default_hooks.checkpoint: expected {sorted(known)}, got '
                f'{unknown}'
            )
        super().__init__(*args, **kwargs)
        # MMEngine would never save, or fail as it saves
        place = 'default_hooks.checkpoint'
        if self.interval != -1:  # -1 is for never
            check_integer(f'{place}.interval', self.interval, 1)
        check_integer(f'{place}.max_keep_ckpts', self.max_keep_ckpts, -1)

    def before_train(self, runner: Any) -> None:
        """Remember what was saved before a resume.

        The message hub holds names; the files are those in the folder that
        this run saves to.
        """
        super().before_train(runner)
        info = runner.message_hub.runtime_info
        self.last_ckpt = self._path(info, 'last_ckpt')
        if self.save_best is None:
            return
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = self._path(info, 'best_ckpt')
            return
        for key in self.key_indicators:
            path = self._path(info, f'best_ckpt_{key}')
            self.best_ckpt_path_dict[key] = path

    def _path(self, info: dict, key: str) -> str | None:
        name = checkpoint_name(info.get(key), key)
        return name and self.file_backend.join_path(self.out_dir, name)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Refuse what is not finite; add gradients that wait for a step;
        leave plain values alone, of paths the names.

        Raises:
            TrainingError: If a parameter or buffer is NaN or infinite: a bad
                checkpoint must not take the place of a good one.
        """
        for name, value in checkpoint['state_dict'].items():
            if value.is_floating_point() and not value.isfinite().all():
                raise TrainingError(
                    f'step {runner.iter + 1}: {name} holds NaN or infinity; '
                    'no checkpoint is written, earlier ones are unchanged'
                )
        if 'optimizer' in checkpoint and get_world_size() == 1:
            waiting = {
                name: parameter.grad.detach().cpu().clone()
                for name, parameter in bare_model(runner).named_parameters()
                if parameter.grad is not None
            }
            if waiting:
                checkpoint[GRADIENTS] = waiting
        model = bare_model(runner)
        network = getattr(model, 'architecture', None)
        if network is not None:
            checkpoint['meta']['quantizer_bits'] = bits_of(network)
            checkpoint['meta']['description'] = getattr(
                model, 'description', None
            )
        info = checkpoint['message_hub']['runtime_info']
        for key, value in info.items():
            if key == 'last_ckpt' or key.startswith('best_ckpt'):
                info[key] = checkpoint_name(value, key)
        for key in checkpoint.keys() - {'state_dict'}:
            checkpoint[key] = plain(checkpoint[key], key)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Put gradients that wait for a step back; warn of other bits."""
        network = getattr(bare_model(runner), 'architecture', None)
        if network is not None and not runner._resume:
            try:
                source = str(runner._load_from)
                check_same_bits(network, checkpoint.get('meta'), source)
            except UsageError as error:  # a start from more bits is allowed
                runner.logger.warning(str(error))
        waiting = checkpoint.get(GRADIENTS, {})
        if not runner._resume or get_world_size() > 1:
            return
        for name, parameter in bare_model(runner).named_parameters():
            if name in waiting:
                parameter.grad = waiting[name].to(parameter.device)

    def _save_checkpoint_with_step(
        self, runner: Any, step: int, meta: dict
    ) -> None:
        oldest = None
        if self.max_keep_ckpts > 0 and (
            not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step
        ):
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                oldest = self.keep_ckpt_ids.popleft()
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info(
                'keep_ckpt_ids', list(self.keep_ckpt_ids)
            )
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        write_atomically(
            os.path.join(runner.work_dir, 'last_checkpoint'),
            os.fsencode(self.last_ckpt),
        )
        if oldest is not None:
            name = self.filename_tmpl.format(oldest)
            path = self.file_backend.join_path(self.out_dir, name)
            _remove(self.file_backend, path)

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        names = self.key_indicators if self.save_best else []
        missing = [k for k in names if k != 'auto' and k not in metrics]
        if missing:
            raise UsageError(
                'default_hooks.checkpoint.save_best: expected one of '
                f'{sorted(metrics)}, which val_evaluator gives, got '
                f'{missing[0]!r}'
            )
        backend = self.file_backend
        later = self.file_backend = _RemoveLater(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        best = {
            getattr(self, 'best_ckpt_path', None),
            *getattr(self, 'best_ckpt_path_dict', {}).values(),
        }
        for path in later.paths:
            if path not in best:
                _remove(backend, path)


def _remove(backend: Any, path: str) -> None:
    if backend.isfile(path):
        backend.remove(path)


class _RemoveLater:
    """A file backend that only notes what is to be removed."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.paths: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.paths.append(path)

    rmtree = remove
