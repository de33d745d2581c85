"""What a training checkpoint holds, in plain values, and back.

MMEngine stores objects in its checkpoints and believes them as it resumes.
Ours hold tensors, numbers, text, lists and dicts. What is read is compared
with the model, optimizer and schedule at hand before any of it is used.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from mmauxq.errors import UsageError, shorten
from mmauxq.log import warn

OWN_OF_RUN = {'cfg', 'experiment_name', 'loop_stage', 'seed'}
"""Entries of the message hub that are set by the run at hand."""
COUNTS = {
    'epoch', 'iter', 'max_epochs', 'max_iters', 'mmauxq/epoch_length',
    'mmauxq/validated',
}  # fmt: skip
CHECKPOINT = re.compile(r'[^/\\\0.][^/\\\0]{0,250}\.pth')
"""Names of files that the checkpoint hook may write."""
OF_DEVICE = {'capturable', 'differentiable', 'foreach', 'fused'}
"""Settings of an optimizer that do not change its numbers."""


def plain(value: Any, place: str) -> Any:
    """``value`` as tensors, numbers, text, lists, tuples and dicts.

    What has no such form becomes ``None``, and the log says so.

    Args:
        value: Any object.
        place: Where it stands in the checkpoint, for the log.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in 'biuf':
        return torch.from_numpy(value.copy())
    if isinstance(value, HistoryBuffer):
        log, count = value.data
        return dict(
            log=torch.tensor(log, dtype=torch.float64),
            count=torch.tensor(count, dtype=torch.float64),
            max_length=value.max_length,
        )
    if isinstance(value, Mapping):
        return {
            key if type(key) is int else str(key): plain(v, f'{place}.{key}')
            for key, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = (plain(v, f'{place}.{i}') for i, v in enumerate(value))
        return tuple(items) if isinstance(value, tuple) else list(items)
    if isinstance(value, (int, float, str)):  # subclasses
        base = next(b for b in (int, float, str) if isinstance(value, b))
        return base(value)
    warn(
        f'{place} is not stored in the checkpoint: expected tensors, numbers, '
        f'text, lists or dicts, got {type(value).__name__}'
    )
    return None


class Checked:
    """Compares the parts of a checkpoint with what they are for.

    Args:
        source: Name of the file, for messages.
    """

    def __init__(self, source: str) -> None:
        self.source = source

    def wrong(self, place: str, expected: str, got: Any) -> UsageError:
        """The error for a value."""
        got = shorten(got, 60)
        return UsageError(
            f'checkpoint {self.source}: {place}: expected {expected}, got '
            f'{got}; start from its weights with load_from in place of '
            'resuming'
        )

    def number(self, place: str, got: Any, least: float = -math.inf) -> Any:
        """A finite number, from ``least``."""
        if type(got) not in (int, float) or not least <= got < math.inf:
            low = '' if least == -math.inf else f' from {least:g}'
            raise self.wrong(place, f'a finite number{low}', got)
        return got

    def count(self, place: str, got: Any) -> int:
        """An integer that counts something."""
        if type(got) is not int or not 0 <= got < 2**53:
            raise self.wrong(place, 'an integer from 0', got)
        return got

    def tensor(self, place: str, got: Any, shape: Sequence[int]) -> Tensor:
        """A tensor of finite numbers, in this shape."""
        shape = tuple(shape)
        if not isinstance(got, Tensor) or got.shape != shape:
            shown = tuple(got.shape) if isinstance(got, Tensor) else got
            raise self.wrong(place, f'a tensor of shape {shape}', shown)
        if not got.isfinite().all():
            raise self.wrong(place, 'finite numbers', 'NaN or infinity')
        return got

    def mapping(self, place: str, got: Any) -> dict:
        """A dict."""
        if not isinstance(got, dict):
            raise self.wrong(place, 'a dict', got)
        return got

    def like(self, place: str, own: Any, got: Any) -> Any:
        """``got`` in the types of ``own``, which it must have."""
        if isinstance(own, bool) or own is None:
            known = bool if isinstance(own, bool) else (type(None), bool)
            if isinstance(got, known):
                return got
            if own is None:
                return self.number(place, got)
            raise self.wrong(place, 'True or False', got)
        if isinstance(own, int):
            if type(got) is not int:
                raise self.wrong(place, 'an integer', got)
            return got
        if isinstance(own, float):
            return self.number(place, got)
        if isinstance(own, str):
            if got != own:
                raise self.wrong(place, repr(own), got)
            return got
        if isinstance(own, Tensor):
            return self.tensor(place, got, own.shape).to(own)
        if isinstance(own, (list, tuple)):
            if not isinstance(got, (list, tuple)) or len(got) != len(own):
                raise self.wrong(place, f'a list of {len(own)} values', got)
            pairs = enumerate(zip(own, got, strict=True))
            return type(own)(
                self.like(f'{place}.{i}', a, b) for i, (a, b) in pairs
            )
        if isinstance(own, dict):
            got = self.mapping(place, got)
            if all(isinstance(key, int) for key in own):  # milestones
                for key, value in got.items():
                    self.count(f'{place}: a key', key)
                    self.count(f'{place}.{key}', value)
                return type(own)(got)
            return self.fields(place, own, got)
        return own  # a function, or an object that belongs to this run

    def fields(self, place: str, own: Mapping, got: Any) -> dict:
        """The entries of a dict with known keys; ``own`` where one is
        missing."""
        got = self.mapping(place, got)
        foreign = sorted(str(key) for key in got.keys() - own.keys())
        if foreign:
            raise self.wrong(place, f'keys out of {sorted(own)}', foreign[0])
        return {
            key: self.like(f'{place}.{key}', value, got.get(key, value))
            for key, value in own.items()
        }

    # --- parts of a checkpoint ----------------------------------------------

    def weights(self, place: str, got: Any, own: Mapping) -> dict[str, Tensor]:
        """Tensors by name, each in the shape of the one in ``own``."""
        for name, value in self.mapping(place, got).items():
            if name not in own:
                raise self.wrong(place, 'parameters of this model', name)
            self.tensor(f'{place}.{name}', value, own[name].shape)
        return got

    def optimizer(self, wrapper: Any, got: Any) -> dict:
        """The state of an optimizer wrapper, or of several by name."""
        got = self.mapping('optimizer', got)
        if hasattr(wrapper, 'optim_wrappers'):
            return {
                name: self.optimizer(inner, got.get(name))
                for name, inner in wrapper.optim_wrappers.items()
            }
        own = wrapper.state_dict()
        parameters = [
            parameter
            for group in wrapper.optimizer.param_groups
            for parameter in group['params']
        ]
        groups = self._groups(own['param_groups'], got.get('param_groups'))
        expected = {
            index: (parameters[index], group)
            for group in groups
            for index in group['params']
        }
        state = self.mapping('optimizer.state', got.get('state'))
        result = dict(own, param_groups=groups)
        kinds: dict[str, dict[str, str]] = {}
        for index, values in state.items():
            place = f'optimizer.state.{index}'
            if index not in expected:
                raise self.wrong(place, 'a parameter of this model', index)
            parameter, group = expected[index]
            known = repr({k: v for k, v in group.items() if k != 'params'})
            if known not in kinds:
                kinds[known] = _kinds_of_state(wrapper.optimizer, group)
            self._state(place, values, parameter, kinds[known])
        result['state'] = state
        for key in result.keys() & got.keys() - {'param_groups', 'state'}:
            place, mine = f'optimizer.{key}', own[key]
            if mine and key == 'base_param_settings':
                result[key] = self._settings(place, mine, got[key])
            elif mine:
                result[key] = self.fields(place, mine, got[key])
        for key, value in result.get('loss_scaler', {}).items():
            self.number(f'optimizer.loss_scaler.{key}', value, 0)
        return result

    def _groups(self, own: list[dict], got: Any) -> list[dict]:
        place = 'optimizer.param_groups'
        if not isinstance(got, list) or len(got) != len(own):
            raise self.wrong(place, f'a list of {len(own)} groups', got)
        result = []
        for i, (mine, theirs) in enumerate(zip(own, got, strict=True)):
            theirs = self.mapping(f'{place}.{i}', theirs)
            if theirs.get('params') != mine['params']:
                raise self.wrong(
                    f'{place}.{i}.params',
                    f'{len(mine["params"])} parameters of this model',
                    theirs.get('params'),
                )
            result.append(self._settings(f'{place}.{i}', mine, theirs))
        return result

    def _settings(self, place: str, own: dict, got: Any) -> dict:
        """Learning rate and the like, as far as the optimizer has them."""
        result = dict(own)
        for key in own.keys() & self.mapping(place, got).keys() - OF_DEVICE:
            where, value = f'{place}.{key}', got[key]
            if type(own[key]) in (int, float):
                low = -math.inf if key == 'dampening' else 0
                result[key] = self.number(where, value, low)
            else:
                result[key] = self.like(where, own[key], value)
        for beta in result.get('betas', ()):
            if not 0 <= beta < 1:
                raise self.wrong(f'{place}.betas', 'numbers below 1', beta)
        return result

    def _state(
        self, place: str, got: Any, parameter: Tensor, kinds: dict[str, str]
    ) -> None:
        got = self.mapping(place, got)
        if got and kinds and got.keys() != kinds.keys():
            expected = f'the keys {sorted(kinds)}'
            raise self.wrong(place, expected, sorted(map(str, got)))
        for key, value in got.items():
            where, kind = f'{place}.{key}', kinds.get(key, 'free')
            if kind == 'whole':
                self.tensor(where, value, parameter.shape)
            elif isinstance(value, Tensor):
                self.tensor(where, value, value.shape)
                if kind == 'number' and value.numel() != 1:
                    raise self.wrong(where, 'one number', tuple(value.shape))
            elif value is not None:
                self.number(where, value)
            negative = isinstance(value, Tensor) and bool((value < 0).any())
            if key in ('step', 'exp_avg_sq', 'square_avg') and negative:
                raise self.wrong(where, 'no negative numbers', 'some')

    def schedulers(self, own: Any, got: Any) -> Any:
        """The states of a list of schedulers, or of lists by name."""
        if isinstance(own, dict):
            got = self.mapping('param_schedulers', got)
            return {k: self.schedulers(v, got.get(k)) for k, v in own.items()}
        if not isinstance(got, list) or len(got) != len(own):
            expected = f'the states of {len(own)} schedulers'
            raise self.wrong('param_schedulers', expected, got)
        result = []
        for i, (scheduler, state) in enumerate(zip(own, got, strict=True)):
            place = f'param_schedulers.{i}'
            state = self.fields(place, scheduler.state_dict(), state)
            for key in ('last_step', '_global_step'):
                self.count(f'{place}.{key}', state.get(key, 0))
            result.append(state)
        return result

    def message_hub(self, got: dict, here: bool) -> dict:
        """The log and what hooks keep in it, for ``MessageHub``.

        Args:
            got: As it stands in the file.
            here: Whether the file is in the work directory of this run, so
                that names of other files in it mean something.
        """
        log = {}
        for name, entry in got['log_scalars'].items():
            place = f'message_hub.log_scalars.{name}'
            entry = self.mapping(place, entry)
            length = self.count(f'{place}.max_length', entry.get('max_length'))
            values = entry.get('log'), entry.get('count')
            if not all(isinstance(v, Tensor) and v.ndim == 1 for v in values):
                raise self.wrong(place, 'two tensors of one axis', entry)
            if not len(values[0]) == len(values[1]) <= length:
                raise self.wrong(place, 'as many values as counts', entry)
            log[name] = HistoryBuffer(
                *(v.double().numpy() for v in values), max_length=length
            )
        info = {}
        for name, value in got['runtime_info'].items():
            place = f'message_hub.runtime_info.{name}'
            if name in OWN_OF_RUN:
                continue
            if name.startswith('best_score'):
                self.number(place, value)
            elif name in COUNTS:
                self.count(place, value)
            elif name == 'mmauxq/seconds':
                self.number(place, value, 0)
            elif name == 'keep_ckpt_ids':
                if not isinstance(value, (list, tuple)):
                    raise self.wrong(place, 'a list of steps', value)
                value = [self.count(place, step) for step in value]
            elif name == 'last_ckpt' or name.startswith('best_ckpt'):
                value = checkpoint_name(value, name)
            if here or 'ckpt' not in name:
                info[name] = value
        kept = {*log, *info}
        return dict(
            log_scalars=log,
            runtime_info=info,
            resumed_keys={
                key: bool(value)
                for key, value in got['resumed_keys'].items()
                if key in kept
            },
        )


def checkpoint_name(value: Any, key: str = 'last_ckpt') -> str | None:
    """The name of a checkpoint, without folders, if ``value`` is a path of
    one; ``None`` if not.

    Args:
        value: Of an entry of the message hub, or of ``last_checkpoint``.
        key: Of that entry; what ``best_ckpt...`` names is removed when there
            is a better one, and so must begin with ``best_``.
    """
    name = value.rpartition('/')[2] if isinstance(value, str) else ''
    known = key == 'last_ckpt' or name.startswith('best_')
    return name if known and CHECKPOINT.fullmatch(name) else None


def _kinds_of_state(
    optimizer: torch.optim.Optimizer, group: dict
) -> dict[str, str]:
    """What an optimizer keeps of each parameter: ``'whole'`` for a tensor in
    the parameter's shape, ``'number'``, or ``'free'``; empty if it cannot be
    tried."""
    parameter = nn.Parameter(torch.zeros(2, 3))
    parameter.grad = torch.zeros(2, 3)
    settings = {
        key: value
        for key, value in group.items()
        if key in optimizer.defaults and key not in OF_DEVICE
    }
    try:
        trial = type(optimizer)([parameter], **settings)
        trial.step()
    except Exception:
        return {}
    kinds = {}
    for key, value in trial.state[parameter].items():
        kinds[key] = 'number'
        if isinstance(value, Tensor) and value.numel() > 1:
            whole = value.shape == parameter.shape
            kinds[key] = 'whole' if whole else 'free'
    return kinds
