"""Whether a config and the paths of a command can be what they should be."""

import os
import tempfile
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmauxq.errors import UsageError


def check_model(cfg: Config, path: str) -> None:
    model = cfg.get('model')
    if not isinstance(model, dict):
        raise UsageError(f'{path} has no `model`')
    network = model.get('architecture', model)
    if not isinstance(network, dict):
        raise UsageError(
            f'{path}: model.architecture={network!r}; allowed is the config '
            'of a classifier'
        )
    if 'type' not in network:
        raise UsageError(f'{path} has no classifier: `model` has no `type`')
    if 'type' not in model:
        raise UsageError(f'{path}: `model` has no `type`')
    if 'backbone' in network and not network.get('head'):
        raise UsageError(
            f'{path} has no classifier: `model` has a backbone but no head'
        )


def check_training(cfg: Config, path: str) -> None:
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
        if cfg.get(key) is None:
            raise UsageError(f'{path} has no `{key}`')


def set_work_dir(cfg: Config, config: str, work_dir: str | None) -> None:
    """Decide on the work directory and see that it can be written."""
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(config).stem)
    try:
        os.makedirs(cfg.work_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=cfg.work_dir):
            pass
    except OSError as error:
        raise UsageError(
            f'work dir {cfg.work_dir} cannot be written: {error.strerror}'
        ) from error


def writable_file(path: str) -> Path:
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open('a'):
            pass
    except OSError as error:
        raise UsageError(
            f'--out {path} cannot be written: {error.strerror}'
        ) from error
    return file


def check_samples(runner: Any) -> None:
    """See that what the data sets give can enter a model.

    An error of the data set itself is left to the loop, which meets it too.

    Raises:
        UsageError: If a data set is empty, or its first sample has no
            ``inputs``.
    """
    loops = {'train': runner._train_loop, 'val': runner._val_loop}
    for name, loop in loops.items():
        dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', None)
        if dataset is None:
            continue
        if len(dataset) == 0:
            raise UsageError(
                f'{name}_dataloader.dataset has no sample; needed is one '
                'at least'
            )
        try:
            sample = dataset[0]
        except Exception:
            continue
        if not isinstance(sample, dict) or 'inputs' not in sample:
            raise UsageError(
                f'{name}_dataloader.dataset.pipeline: it gives '
                f'{_keys(sample)} and no `inputs`; needed is a pipeline that '
                "ends with dict(type='PackInputs')"
            )


def _keys(sample: Any) -> str:
    if isinstance(sample, dict):
        return f'the keys {sorted(map(str, sample))}'
    return f'a {type(sample).__name__}'
