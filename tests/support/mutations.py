"""Wrong configs, made of right ones.

Nothing here is a test; see test_mutated_configs.py and stress/configs.py.
"""

import copy
import functools
import io
import math
import re
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from mmengine.config import Config

from mmauxq.checkpoint_file import read_checkpoint
from tests.commands import train
from tests.conftest import ROOT

KINDS = ('qat', 'aux', 'dsn')
TOP = (
    'model', 'optim_wrapper', 'param_scheduler', 'train_cfg', 'default_hooks',
    'train_dataloader', 'val_dataloader', 'val_evaluator', 'randomness',
    'data_preprocessor', 'custom_hooks', 'load_from', 'resume', 'log_level',
    'val_cfg',
)  # fmt: skip
VALUES = (
    None, True, False, -1, 0, 1, 3, 50, 0.5, -0.5, 1e30, math.nan, math.inf,
    '', 'abc', '8', [], [1], [-1, 2], {}, {'a': 1}, {'type': 'abc'},
)  # fmt: skip
REMOVE = 'remove'
RENAME = 'rename'


@dataclass(frozen=True)
class Mutation:
    """One change of one recipe.

    Args:
        kind: Of the recipe, ``'qat'``, ``'aux'`` or ``'dsn'``.
        path: Keys (and indices) that lead to what is changed.
        how: ``REMOVE``, ``RENAME``, or ``'set'``.
        value: For ``'set'``.
    """

    kind: str
    path: tuple
    how: str
    value: Any = None

    def __str__(self) -> str:
        place = '.'.join(map(str, self.path))
        return f'{self.kind}: {self.how} {place} {self.value!r}'


@functools.cache
def recipe(kind: str) -> dict:
    """A small recipe that trains for one step."""
    cfg = Config.fromfile(ROOT / f'configs/{kind}_r20_w2a2_digits.py')
    model = cfg.model.architecture
    model.backbone.update(depth=8, base_channels=4)
    model.head.in_channels = 16
    cfg.train_cfg = dict(by_epoch=False, max_iters=1, val_interval=1)
    cfg.param_scheduler = dict(
        type='CosineAnnealingLR', T_max=1, by_epoch=False
    )
    cfg.train_dataloader.batch_size = 8
    cfg.train_dataloader.dataset.indices = 8
    cfg.val_dataloader.dataset.indices = 4
    cfg.default_hooks.checkpoint.update(by_epoch=False)
    cfg.custom_hooks = [dict(type='SyncBuffersHook')]
    if kind != 'qat':
        cfg.custom_hooks.append(
            dict(type='mmauxq.GuidanceWeightHook', end_weight=0.1, end=1.0)
        )
    cfg.model.quantizers.weight.per_channel = kind == 'aux'
    cfg.model.policy.layers = {'backbone.layer1.*.conv1': 8}
    cfg.log_level = 'ERROR'
    cfg.randomness = dict(seed=0)
    return {k: v for k, v in cfg.to_dict().items() if '_base_' not in k}


def paths(value: Any, prefix: tuple = ()) -> list[tuple]:
    """All places in nested dicts and lists."""
    found = [prefix] if prefix else []
    items = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        if prefix or key in TOP:
            found += paths(inner, (*prefix, key))
    return found


@functools.cache
def places(kind: str) -> tuple:
    """What can be changed in a recipe."""
    return tuple(paths(recipe(kind)))


@st.composite
def mutations(draw) -> Mutation:
    """A strategy of hypothesis."""
    kind = draw(st.sampled_from(KINDS))
    path = draw(st.sampled_from(places(kind)))
    hows = ['set'] * 6 + [REMOVE]
    if isinstance(path[-1], str):
        hows.append(RENAME)
    how = draw(st.sampled_from(hows))
    value = draw(st.sampled_from(VALUES)) if how == 'set' else None
    return Mutation(kind, path, how, copy.deepcopy(value))


def mutated(mutation: Mutation) -> dict:
    """The recipe after the change."""
    cfg = copy.deepcopy(recipe(mutation.kind))
    owner = cfg
    for key in mutation.path[:-1]:
        owner = owner[key]
    key = mutation.path[-1]
    if mutation.how == REMOVE:
        del owner[key]
    elif mutation.how == RENAME:
        owner[renamed(key)] = owner.pop(key)
    else:
        owner[key] = mutation.value
    return cfg


def as_text(value: Any) -> str:
    """``value`` in Python."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, dict):
        inner = (f'{k!r}: {as_text(v)}' for k, v in value.items())
        return '{' + ', '.join(inner) + '}'
    if isinstance(value, (list, tuple)):
        inner = ', '.join(map(as_text, value))
        return f'[{inner}]' if isinstance(value, list) else f'({inner},)'
    return repr(value)


def run(mutation: Mutation, folder: Path) -> tuple[int, str]:
    """Train one step; returns the exit status and what was printed."""
    config = folder / 'config.py'
    lines = [f'{k} = {as_text(v)}\n' for k, v in mutated(mutation).items()]
    lines.append(f"experiment_name = 'mutated_{time.time_ns()}'\n")
    config.write_text(''.join(lines))
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        status = train([str(config), '--work-dir', str(folder / 'run')])
    return status, out.getvalue()


def verdict(mutation: Mutation, status: int, out: str, folder: Path) -> str:
    """``'trained'``, ``'refused'``, or what is wrong with the outcome."""
    errors = [s for s in out.splitlines() if s.startswith('error: ')]
    if status == 0:
        pointer = folder / 'run/last_checkpoint'
        if not pointer.exists():
            return 'trained'  # asked to save nothing
        state = read_checkpoint(pointer.read_text())['state_dict']
        finite = all(
            bool(torch.isfinite(v.float()).all()) for v in state.values()
        )
        return 'trained' if finite else 'trained to numbers not finite'
    if 'Traceback' in out:
        return 'a traceback: ' + out.strip().splitlines()[-1][:300]
    if len(errors) != 1:
        return f'{len(errors)} lines of error'
    line = errors[0]
    if 'NaN or infinity' in line and status == 1:
        return 'refused'
    if status != 2:
        return f'status {status}: {line}'
    names = [p for p in mutation.path if isinstance(p, str)]
    # the key itself, or the part of the config that holds it
    names = names[1:] or names
    if mutation.how == RENAME:
        names.append(renamed(mutation.path[-1]))
    # messages of other packages are shown as they are
    theirs = re.search(r'\w+Error: |missing key|must contain the key', line)
    if not theirs and not any(name in line for name in names):
        return f'the key is not named: {line}'
    return 'refused'


def renamed(key: str) -> str:
    """``key`` with a slip of the finger."""
    return key[:-1] + 'x' + key[-1:]
