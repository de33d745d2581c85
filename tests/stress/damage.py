"""Damage honest files in ten thousand ways, and load each.

    python -m tests.stress.damage --cases 10000 --out DIR

For each loader, a file is damaged by flipped bits, cuts, blank blocks, spans
that are lost, repeated or swapped, and other numbers. It must load to values
that are in order, or be refused in one line that names it. DIR/damage.json has
the counts; the exit status is 0 only if no file did anything else.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.compare.comparison import collect, plan
from mmauxq.deploy import fill_packed, write_packed
from mmauxq.engine.resume import resume
from mmauxq.errors import UsageError, one_line
from mmauxq.network.checkpoint import check_architecture, normalise
from tests.networks import batch, joint_qat
from tests.support.damage import damaged


@dataclass
class Outcome:
    """What came of the cases of a loader."""

    taken: int = 0
    refused: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)


def _network() -> Any:
    model = joint_qat(guidance=None)
    model.loss(*batch())
    return model.eval()


def _in_order(state: dict) -> None:
    for name, value in state.items():
        assert value.isfinite().all(), name
        assert not name.endswith('_quantizer.step') or (value > 0).all(), name


def checkpoint(folder: Path) -> tuple[Path, Callable[[], Any]]:
    """A slim checkpoint, in torch's format."""
    return _state(folder, True)


def old_format(folder: Path) -> tuple[Path, Callable[[], Any]]:
    """The same in torch's format from before 1.6."""
    return _state(folder, False)


def _state(folder: Path, zipped: bool) -> tuple[Path, Callable[[], Any]]:
    network = _network().architecture
    file = folder / 'slim.pth'
    content = dict(state_dict=network.state_dict(), meta=dict(epoch=1))
    torch.save(content, file, _use_new_zipfile_serialization=zipped)

    def load() -> None:
        state = normalise(read_checkpoint(file), str(file))
        state = check_architecture(network, state, str(file))
        filled = copy.deepcopy(network)
        filled.load_state_dict(state, strict=False)
        _in_order(filled.state_dict())

    return file, load


def training(folder: Path) -> tuple[Path, Callable[[], Any]]:
    """A training checkpoint that a run goes on from."""
    from tests.engine.test_training_state import runner_of, unstarted

    runner_of(folder, epochs=1).train()
    runner = unstarted(runner_of(folder))

    def load() -> None:
        resume(runner, str(folder / 'epoch_1.pth'))
        _in_order(runner.model.state_dict())

    return folder / 'epoch_1.pth', load


def packed(folder: Path) -> tuple[Path, Callable[[], Any]]:
    """A packed network."""
    network = _network().architecture
    file = folder / 'packed.safetensors'
    write_packed(network, file, torch.zeros(1, 1, 8, 8), dict(mean=[0.5]))

    def load() -> None:
        filled = copy.deepcopy(network)  # what is taken changes its grids
        fill_packed(file, filled)
        _in_order(filled.state_dict())

    return file, load


def comparison(folder: Path) -> tuple[Path, Callable[[], Any]]:
    """The description of a comparison."""
    from mmengine.config import Config

    configs = {'a': Config(dict(x=1)), 'b': Config(dict(x=2))}
    plan(folder, configs, [0, 1])
    file = folder / 'comparison.json'
    return file, lambda: plan(folder, configs, [0, 1])


def results(folder: Path) -> tuple[Path, Callable[[], Any]]:
    """The results of a comparison."""
    from tests.compare.conftest import record

    file = folder / 'results.jsonl'
    records = [record(a, s) for a in ('plain', 'aux') for s in range(3)]
    file.write_text(''.join(json.dumps(r) + '\n' for r in records))

    def load() -> None:
        for run in collect(folder):
            assert 0 <= run['final'] <= 100

    return file, load


LOADERS = dict(
    (make.__name__.replace('_', ' '), make)
    for make in (checkpoint, old_format, training, packed, comparison, results)
)


def try_all(
    name: str, folder: Path, cases: int, seed: int, progress: bool = False
) -> Outcome:
    """Damage the file of a loader in many ways, and load each."""
    file, load = LOADERS[name](folder)
    honest = file.read_bytes()
    load()
    outcome = Outcome()
    for number, (kind, data) in enumerate(damaged(honest, cases, seed)):
        file.write_bytes(data)
        begin = time.monotonic()
        try:
            load()
            outcome.taken += 1
        except UsageError as error:
            text = str(error)
            outcome.refused += 1
            if '\n' in text or str(file.parent) not in text:
                outcome.failures.append(f'{number}, {kind}: {text}')
        except Exception as error:
            outcome.failures.append(f'{number}, {kind}: {one_line(error)}')
        outcome.slowest = max(outcome.slowest, time.monotonic() - begin)
        if progress and number % 500 == 499:
            print(f'{name}: {number + 1} of {cases}', flush=True)
    file.write_bytes(honest)
    return outcome


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cases', type=int, default=10_000)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--seed', type=int, default=1)
    args = parser.parse_args()
    share = -(-args.cases // len(LOADERS))
    counts = {}
    for name in LOADERS:
        folder = args.out / name.replace(' ', '_')
        folder.mkdir(parents=True)
        outcome = try_all(name, folder, share, args.seed, progress=True)
        counts[name] = vars(outcome)
        print(name, counts[name], flush=True)
    (args.out / 'damage.json').write_text(json.dumps(counts, indent=1))
    return int(any(count['failures'] for count in counts.values()))


if __name__ == '__main__':
    sys.exit(main())
