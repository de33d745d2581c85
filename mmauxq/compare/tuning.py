"""One setting, tuned for each arm on images that training does not see.

Of a comparison in ``OUT``::

    OUT/tune/float/                      the float networks of these runs
    OUT/tune/KEY=VALUE/runs/ARM/SEED/    each arm with each value

The validation of the comparison takes no part in the choice.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from urllib.parse import quote

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from mmauxq import text
from mmauxq.config_types import type_name
from mmauxq.engine.config_validation import merge_options
from mmauxq.engine.error_context import walk
from mmauxq.errors import UsageError, one_line, shorten, unknown_name

from .arms import check_arms
from .comparison import plan
from .placement import Run
from .records import is_value, read_result

Value = float | str
WRAPPERS = ('mmauxq.InMemoryImages', 'RepeatDataset', 'ClassBalancedDataset')
"""Data sets that augment or repeat another one, which holds the images."""
FIXED = ('train_cfg', 'val_dataloader', 'val_evaluator')
"""Parts of a config with which no arm may win."""
FEW = 1000
"""On fewer held-out images one seed chooses nearly at random: top-1 has a
standard error of about a point or more."""
UNBUILT = ('optim_wrapper', 'param_scheduler')
"""Parts of a config that change no model."""


@dataclass(frozen=True)
class Tuning:
    """What is tuned, and on what.

    Args:
        key: Dotted path in the config of an arm.
        values: What each arm that has this setting is trained with.
        hold_out: Number of training images that are held out.
        seeds: Of these runs. A value counts by the mean over them.
    """

    key: str
    values: tuple[Value, ...]
    hold_out: int
    seeds: tuple[int, ...]

    def arms(self, configs: Mapping[str, Config]) -> dict[str, Config]:
        """The arms whose config has the key."""
        return {
            name: config
            for name, config in configs.items()
            if self.key in dict(walk(config._cfg_dict))
        }

    def with_value(self, config: Config, value: Value) -> Config:
        """A copy of the config of an arm with one of the values."""
        config = copy.deepcopy(config)
        merge_options(config, {self.key: value}, '--tune')
        return config

    def check(
        self, configs: Mapping[str, Config], floats: Mapping[str, Config]
    ) -> None:
        """Build every arm with every value that makes another model, and the
        data.

        Raises:
            UsageError: If one cannot be built, there are too few images, or
                the float networks are trained on others.
        """
        for value in self.values:
            arms = self.arms(configs)
            tuned = {k: self.with_value(c, value) for k, c in arms.items()}
            if self.key.split('.')[0] not in UNBUILT:
                check_arms(tuned)
        every = [*floats.values(), *configs.values()]
        sources = [_source(config.train_dataloader) for config in every]
        for source in sources:  # it may augment its images in another way
            for key in ('pipeline', '_scope_'):
                source.pop(key, None)
        if any(source != sources[0] for source in sources):
            raise UsageError(
                '--hold-out: expected one training data set for --float and '
                f'the arms, got {shorten(sources[0])} and '
                f'{shorten(sources[-1])}'
            )
        config = hold_out(every[0], self.hold_out)
        init_default_scope(config.get('default_scope', 'mmpretrain'))
        try:
            DATASETS.build(_source(config.val_dataloader))
        except Exception as error:  # a data set may raise anything
            raise UsageError(f'--hold-out: {one_line(error)}') from error

    def plan(self, out: Path, configs: Mapping[str, Config]) -> list[Run]:
        """Write the folders of the runs; what is finished there stays.

        Args:
            out: ``OUT/tune``.
            configs: Of the arms.
        """
        less = {
            name: hold_out(config, self.hold_out)
            for name, config in self.arms(configs).items()
        }
        runs = []
        for value in self.values:
            arms = {k: self.with_value(c, value) for k, c in less.items()}
            for run in plan(self._folder(out, value), arms, self.seeds):
                runs.append(replace(run, label=f'{self.key}={value}'))
        return runs

    def metrics(
        self, out: Path, configs: Mapping[str, Config]
    ) -> dict[str, list[float]]:
        """Arm -> final metric on the held-out images, one for each value: the
        mean over seeds, with 0 for those whose training ended in numbers that
        are not finite.

        The arguments are those of :meth:`plan`.
        """
        return {
            name: [
                mean(
                    _final(self._folder(out, value) / f'runs/{name}/{seed}')
                    for seed in self.seeds
                )
                for value in self.values
            ]
            for name in self.arms(configs)
        }

    def choose(
        self, metrics: Mapping[str, Sequence[float]]
    ) -> dict[str, Value]:
        """Arm -> the value with the highest metric, of several the first."""
        return {
            name: self.values[found.index(max(found))]
            for name, found in metrics.items()
        }

    def with_values(
        self, configs: Mapping[str, Config], chosen: Mapping[str, Value]
    ) -> dict[str, Config]:
        """All arms, those of which a value was chosen with it."""
        tuned = {k: self.with_value(configs[k], v) for k, v in chosen.items()}
        return dict(configs) | tuned

    def _folder(self, out: Path, value: Value) -> Path:
        return out / quote(f'{self.key}={value}', safe='=+')


def read_tuning(
    words: str,
    images: int,
    seeds: Sequence[int],
    configs: Mapping[str, Config],
) -> Tuning:
    """Read what the command line says.

    Args:
        words: ``KEY=V1,V2,...``; the values are numbers or strings of JSON.
        images: To hold out.
        seeds: Of the runs.
        configs: Of the arms.

    Raises:
        UsageError: If there are fewer than two different values, no arm has
            the key, or it belongs to what all arms have in common.
    """
    key, equals, rest = words.partition('=')
    try:
        values = json.loads(f'[{rest}]')
    except ValueError:
        values = []
    if not (key and equals and values and all(map(is_value, values))):
        raise UsageError(
            '--tune: expected KEY=V1,V2,... with numbers or strings of JSON, '
            f'got {shorten(words)}'
        )
    if len(set(values)) < max(2, len(values)):
        raise UsageError(
            f'--tune: expected at least two values, each once, got {rest}'
        )
    if key.split('.')[0] in FIXED:
        raise UsageError(
            '--tune: expected a setting in which arms may differ, got '
            f'{shorten(key)}, which is part of the budget'
        )
    tuning = Tuning(key, tuple(values), images, tuple(seeds))
    if not tuning.arms(configs):
        paths = {p for c in configs.values() for p, _ in walk(c._cfg_dict)}
        section = key.rpartition('.')[0]
        known = {p for p in paths if p.rpartition('.')[0] == section}
        top = {path for path in paths if '.' not in path}
        raise unknown_name('--tune', key, sorted(known or top))
    return tuning


def hold_out(config: Config, images: int) -> Config:
    """A copy that trains on all but some of its training images, and is
    validated on these, with its pipeline of the validation.

    Args:
        config: A complete recipe.
        images: Number of images that are held out.
    """
    config = copy.deepcopy(config)
    train, val = config.train_dataloader, config.val_dataloader
    source = _source(train)
    pipeline = _source(val).get('pipeline')
    common = dict(type='mmauxq.HeldOut', dataset=source, count=images)
    other = {} if pipeline is None else dict(pipeline=pipeline)
    _owner(train)['dataset'] = dict(common, part='rest')
    _owner(val)['dataset'] = dict(common, part='held_out', **other)
    return config


def _owner(loader: dict) -> dict:
    """The section whose ``dataset`` holds the images."""
    while type_name(loader['dataset'].get('type')) in WRAPPERS:
        loader = loader['dataset']
    return loader


def _source(loader: dict) -> dict:
    return copy.deepcopy(_owner(loader)['dataset'])


def _final(folder: Path) -> float:
    run = Run(folder.parent.name, int(folder.name), folder)
    return 0.0 if run.diverged.exists() else read_result(run.result)['final']


def table(description: Mapping, metric: str) -> str:
    """What was chosen, and the held-out metric of each value, as Markdown.

    Args:
        description: Result of :func:`mmauxq.compare.comparison.describe`.
        metric: What the runs are measured by, for people.

    Returns:
        A title, a table, a line for each arm that is best at an end of its
        values, and one if the choice is uncertain; empty if nothing was tuned.
    """
    tuning, found = description.get('tuning'), description.get('held_out')
    if not (tuning and found):
        return ''
    values, rows, lines = tuning['values'], [], []
    for arm, metrics in found.items():
        chosen = description['chosen'][arm]
        rows.append([arm, *(f'{each:.2f}' for each in metrics), chosen])
        if type(chosen) is not str and chosen in (values[0], values[-1]):
            lines.append(
                f'warning: arm {arm!r} is best at an end of its values, '
                f'{chosen}; one beyond it may be better'
            )
    title = (
        f'{tuning["key"]}, by final {metric} on {tuning["hold_out"]} images '
        'held out of training'
    )
    if len(tuning['seeds']) > 1:
        title += f', mean of {len(tuning["seeds"])} seeds'
    elif tuning['hold_out'] < FEW:
        lines.append(
            f'warning: one seed on {tuning["hold_out"]} images chooses nearly '
            'at random; --tune-seeds takes several'
        )
    shown = text.table(['arm', *values, 'chosen'], rows)
    return '\n'.join([f'{title}:\n', shown, *(f'{line}\n' for line in lines)])
