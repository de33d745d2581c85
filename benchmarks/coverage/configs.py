"""MMPretrain's configs of image classifiers, and recipes made of them."""

import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.utils import get_installed_path
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmauxq import compat
from mmauxq.cli.load_config import load_config
from mmauxq.engine.config_validation import check_settings
from mmauxq.engine.image_shape import set_image_shape
from mmauxq.errors import UsageError, one_line
from mmauxq.network import sample_images
from mmauxq.network.profile import candidate_shapes

USUAL_SIZE, LARGE_SIZE = 224, 512
DOWNLOADED = ('CIFAR10', 'CIFAR100', 'FashionMNIST', 'MNIST')
"""Data sets that fetch themselves."""
WIDTH = 300
"""Characters of a reason."""


class NetworkError(Exception):
    """MMPretrain's float network cannot be built or run; says why."""


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
    configs: dict[str, str] = {}
    for pattern in patterns or ['**/*.py']:
        own = Path(pattern).is_file()
        files = [Path(pattern)] if own else sorted(root.glob(pattern))
        types = {file: _backbone_type(file) for file in files}
        if not any(types.values()):
            raise UsageError(
                'expected a config of an image classifier, or a pattern of '
                f'those below {root}, got {pattern!r}'
            )
        configs |= {
            str(file.relative_to(root) if root in file.parents else file): type
            for file, type in types.items()
            if type
        }
    return configs


def _backbone_type(file: Path) -> str:
    """Empty if the file is no config of an image classifier."""
    if '_base_' in file.parts:
        return ''
    try:
        model = Config.fromfile(file).get('model')
    except Exception:  # a config is code: it may raise anything
        return ''
    if not isinstance(model, dict) or model.get('type') != 'ImageClassifier':
        return ''
    return str(model.get('backbone', {}).get('type', ''))


def recipe(config: str, head: dict | None = None) -> Config:
    """The three lines over a config, read and checked as ``train`` does.

    Nothing that it names is downloaded afterwards.

    Args:
        config: As of :func:`classifier_configs`.
        head: Of :func:`linear_head`. A backbone that is shipped without a
            head has no data and no schedule, which are then not checked.

    Raises:
        NetworkError: If MMEngine would not train it either.
        UsageError: If ``mmauxq train`` alone refuses it.
    """
    base = config if Path(config).is_file() else f'mmpretrain::{config}'
    network = f'dict(_base_.model, **{head!r})' if head else '_base_.model'
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'recipe.py'
        file.write_text(
            f'_base_ = [{base!r}, "mmauxq::_base_/aux_w4a4.py"]\n'
            f'model = dict(_delete_=True, architecture={network},\n'
            '             **_base_.quantization)\n'
        )
        cfg = load_config(Namespace(config=str(file), cfg_options=None))
    if not head:
        for part in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
            if not cfg.get(part):
                raise NetworkError(f'it has no {part}')
        check_settings(cfg, config)
    compat.enable()
    init_default_scope('mmpretrain')
    without_downloads(cfg._cfg_dict)
    set_image_shape(cfg)
    return cfg


def linear_head(config: str) -> dict:
    """The neck and the head that a config without a head needs.

    Args:
        config: As of :func:`classifier_configs`.

    Returns:
        Sections of ``model``: a linear layer to 1000 classes on what the
        backbone gives last. Empty if the config has a head.

    Raises:
        NetworkError: If MMPretrain cannot build or run the backbone.
    """
    file = Path(config) if Path(config).is_file() else config_root() / config
    cfg = Config.fromfile(file)
    if cfg.model.get('head'):
        return {}
    limit_size(cfg.model.backbone)
    network = float_network(cfg.model, None).eval()
    features = _features(network)
    if isinstance(features, (tuple, list)):
        features = features[-1]
    neck = dict(type='GlobalAveragePooling') if features.dim() > 2 else None
    head = dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=features.shape[1],
        loss=dict(type='CrossEntropyLoss'),
    )
    return dict(neck=neck, head=head)


def limit_size(backbone: dict) -> int | None:
    """Have a backbone for very large images take usual ones.

    Args:
        backbone: Its config; changed if its ``img_size`` is above 512.

    Returns:
        The size that it had, if it is changed.
    """
    size = backbone.get('img_size')
    if not isinstance(size, int) or size <= LARGE_SIZE:
        return None
    backbone['img_size'] = USUAL_SIZE
    return size


def float_network(
    architecture: ConfigDict, preprocessor: dict | None
) -> nn.Module:
    """The classifier of a config, nothing downloaded.

    Args:
        architecture: Its ``model``.
        preprocessor: Its ``data_preprocessor``.

    Raises:
        NetworkError: If MMPretrain cannot build it.
    """
    from mmpretrain.registry import MODELS

    compat.enable()
    settings = without_downloads(architecture.to_dict())
    settings['_scope_'] = 'mmpretrain'
    if preprocessor is not None:
        settings.setdefault('data_preprocessor', dict(preprocessor))
    try:
        return MODELS.build(settings)
    except Exception as error:
        raise NetworkError(one_line(error, WIDTH)) from error


def without_downloads(value: Any) -> Any:
    """Take out of a config what would be downloaded; returns the config."""
    if isinstance(value, dict):
        if value.get('type') in DOWNLOADED:
            value['download'] = False
        for key, inner in list(value.items()):
            if key == 'pretrained' or (
                key == 'init_cfg'
                and isinstance(inner, dict)
                and inner.get('type') == 'Pretrained'
            ):
                value[key] = None
            else:
                without_downloads(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            without_downloads(inner)
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


def _features(network: nn.Module) -> Any:
    """What a backbone gives for the first images that it takes."""
    for shape in candidate_shapes(network):
        try:
            with torch.no_grad():
                return network.backbone(sample_images(network, shape, 2))
        except Exception as error:  # whatever it raises, it does not run
            reason = one_line(error, WIDTH)
    raise NetworkError(reason)
