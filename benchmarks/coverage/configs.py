"""MMPretrain's configs of image classifiers, and the networks they build."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.utils import get_installed_path
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmauxq.algorithms import dry_run
from mmauxq.errors import UsageError

BATCH = 2


class NetworkError(Exception):
    """The float network of MMPretrain does not build or run."""


def config_root() -> Path:
    """The folder of MMPretrain's configs."""
    return Path(get_installed_path('mmpretrain')) / '.mim' / 'configs'


def classifier_configs(patterns: Sequence[str] = ()) -> dict[str, str]:
    """Configs of image classifiers.

    Args:
        patterns: Files, or shell patterns below MMPretrain's ``configs``; all
            of MMPretrain if empty.

    Returns:
        Config -> type of its backbone.

    Raises:
        UsageError: If a pattern matches no classifier.
    """
    root = config_root()
    found: dict[str, str] = {}
    for pattern in patterns or ['**/*.py']:
        files = (
            [Path(pattern)]
            if Path(pattern).is_file()
            else sorted(root.glob(pattern))
        )
        kinds = {_short(file, root): _backbone_type(file) for file in files}
        kinds = {config: kind for config, kind in kinds.items() if kind}
        if not kinds:
            raise UsageError(
                f'{pattern} is no config of an image classifier, neither '
                f'here nor below {root}'
            )
        found.update(kinds)
    return found


def _short(file: Path, root: Path) -> str:
    return str(file.relative_to(root) if root in file.parents else file)


def _backbone_type(file: Path) -> str:
    if '_base_' in file.parts:
        return ''
    try:
        model = Config.fromfile(file).get('model')
    except Exception:  # a config is code: it may raise anything
        return ''
    if not isinstance(model, dict) or model.get('type') != 'ImageClassifier':
        return ''
    return str(model.get('backbone', {}).get('type', ''))


def recipe(config: str, fragment: str = 'aux_w4a4') -> Config:
    """The three lines of contract 1 over ``config``, read."""
    base = config if Path(config).is_file() else f'mmpretrain::{config}'
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'recipe.py'
        file.write_text(
            f'_base_ = [{base!r}, "mmauxq::_base_/{fragment}.py"]\n'
            'model = dict(_delete_=True, architecture=_base_.model,\n'
            '             **_base_.quantization)\n'
        )
        return Config.fromfile(file)


def without_checkpoints(value: Any) -> Any:
    """A config without what would be downloaded."""
    if isinstance(value, dict):
        for key in list(value):
            inner = value[key]
            if key == 'pretrained' or (
                key == 'init_cfg'
                and isinstance(inner, dict)
                and inner.get('type') == 'Pretrained'
            ):
                value[key] = None
            else:
                without_checkpoints(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            without_checkpoints(inner)
    return value


class NoRandomFill(TorchFunctionMode):
    """Leaves new parameters unset, which saves most of a large build."""

    SKIPPED = (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in self.SKIPPED:
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


def one_line(error: BaseException, width: int = 300) -> str:
    """The message of an error, with its type unless it is one of ours."""
    text = ' '.join(str(error).split())
    if not type(error).__module__.startswith('mmauxq.'):
        text = f'{type(error).__name__}: {text}'
    return text if len(text) <= width else text[: width - 3] + '...'


def float_network(cfg: Config) -> nn.Module:
    """The classifier of a :func:`recipe`, with a head, nothing downloaded.

    Raises:
        NetworkError: If MMPretrain cannot build it.
    """
    from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS

    architecture = without_checkpoints(cfg.model.architecture.to_dict())
    architecture['_scope_'] = 'mmpretrain'
    if cfg.get('data_preprocessor') is not None:
        architecture.setdefault(
            'data_preprocessor', cfg.data_preprocessor.to_dict()
        )
    try:
        network = MMPRETRAIN_MODELS.build(architecture)
        if network.head is None:
            # so that a backbone that is shipped alone can be tried at all
            architecture.update(_plain_head(network))
            network = MMPRETRAIN_MODELS.build(architecture)
        return network
    except Exception as error:
        raise NetworkError(one_line(error)) from error


def _plain_head(network: nn.Module) -> dict:
    """Neck and head, 1000 classes, on what the backbone gives last."""
    network.eval()
    with torch.no_grad():
        shape = dry_run.input_shape(network)
        features = network.backbone(dry_run.sample(network, shape, BATCH))
    if isinstance(features, (tuple, list)):
        features = features[-1]
    head = dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=features.shape[1],
        loss=dict(type='CrossEntropyLoss'),
    )
    neck = dict(type='GlobalAveragePooling') if features.dim() > 2 else None
    return dict(neck=neck, head=head)
