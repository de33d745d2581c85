"""Which networks of MMPretrain the three lines of config are enough for.

Every config is tried in a forked process of its own, so that one that fails,
hangs or runs out of memory costs one row of the table and no more.
"""

import copy
import json
import multiprocessing
import os
import random
import resource
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import get_installed_path
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmauxq.algorithms import JointQAT, dry_run
from mmauxq.errors import UsageError
from mmauxq.layers import QuantizedLayer, restore
from mmauxq.quantizers import named_quantizers
from mmauxq.registry import MODELS

from .levels import count_levels

BATCH = 2
SMALL = 64
STEPS = 2
LEARNING_RATE = 1e-3


@dataclass
class Row:
    """What was found for one config.

    Args:
        config: Path below MMPretrain's ``configs``, or of a file.
        backbone: Its registered type.
        verdict: ``'pass'``, ``'fail'`` or ``'mmpretrain'``: the float network
            itself cannot be built or run here.
        reason: Why it is no pass, in one line.
        parameters: Of F, in millions.
        quantized: Number of layers whose operands are quantized.
        kept: Name of a layer that stays float -> why.
        taps: Number of places that are read.
        layouts: Their tensor layouts, in order of appearance.
        guidance_parameters: Of H, in millions.
        guidance_multiply_adds: Of H over those of F.
        signed: Input quantizers that found negative values, and all of them.
        moved: Learned scales that the steps moved, and all of them.
        seconds: Wall time.
    """

    config: str
    backbone: str = ''
    verdict: str = 'fail'
    reason: str = ''
    parameters: float = 0.0
    quantized: int = 0
    kept: dict[str, str] = field(default_factory=dict)
    taps: int = 0
    layouts: list[str] = field(default_factory=list)
    guidance_parameters: float = 0.0
    guidance_multiply_adds: float = 0.0
    signed: tuple[int, int] = (0, 0)
    moved: tuple[int, int] = (0, 0)
    seconds: float = 0.0


class NetworkError(Exception):
    """The float network of MMPretrain does not build or run."""


# --- which configs ---------------------------------------------------------


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


def _without_checkpoints(value: Any) -> Any:
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
                _without_checkpoints(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _without_checkpoints(inner)
    return value


# --- one config ------------------------------------------------------------


class _NoRandomFill(TorchFunctionMode):
    """Leaves new parameters unset, which saves most of a large build."""

    SKIPPED = (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in self.SKIPPED:
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


def count_only(config: str) -> Row:
    """The size of the float network, nothing else."""
    row = Row(config)
    try:
        cfg = recipe(config)
        with _NoRandomFill():
            network = _network(cfg)
        row.parameters = dry_run.count_parameters(network) / 1e6
    except Exception as error:
        row.reason = _one_line(error)
        return row
    row.verdict = 'pass' if cfg.model.architecture.get('head') else 'headless'
    return row


def _network(cfg: Config) -> nn.Module:
    from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS

    architecture = _without_checkpoints(cfg.model.architecture.to_dict())
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
        raise NetworkError(_one_line(error)) from error


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


def try_config(config: str, build_only: bool = False) -> Row:
    """Build F and H for ``config``, and see whether they train.

    Args:
        config: As from :func:`classifier_configs`.
        build_only: Build, and do not train.
    """
    row = Row(config)
    started = time.time()
    try:
        init_default_scope('mmpretrain')
        torch.manual_seed(0)
        cfg = recipe(config)
        row.backbone = cfg.model.architecture.backbone.type
        if build_only:
            with _NoRandomFill():
                _build(cfg, row)
        else:
            _train(cfg, *_build(cfg, row), row)
        row.verdict = 'pass'
    except NetworkError as error:
        row.verdict, row.reason = 'mmpretrain', _one_line(error)
    except Exception as error:
        row.reason = _one_line(error)
        if os.environ.get('MMAUXQ_SWEEP_DEBUG'):
            traceback.print_exc()
    row.seconds = time.time() - started
    return row


def _one_line(error: BaseException, width: int = 300) -> str:
    text = ' '.join(str(error).split())
    if not isinstance(error, (UsageError, NetworkError, _Failed)):
        text = f'{type(error).__name__}: {text}'
    return text if len(text) <= width else text[: width - 3] + '...'


class _Failed(Exception):
    """A check that did not hold; the message says which."""


def _image_size(cfg: Config) -> int | None:
    """What the config's own test pipeline crops to."""
    loader = cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}
    sizes = [
        step.get('crop_size', step.get('scale'))
        for step in loader.get('dataset', {}).get('pipeline', [])
        if 'crop_size' in step or 'scale' in step
    ]
    size = sizes[-1] if sizes else None
    if isinstance(size, (list, tuple)):
        size = size[0]
    return size if isinstance(size, int) and size > 0 else None


def _build(cfg: Config, row: Row) -> tuple[JointQAT, dict]:
    """The algorithm, and what it was built with."""
    network = _network(cfg)
    if not cfg.model.architecture.get('head'):
        row.reason = 'shipped without a head; tried with a linear one'
    row.parameters = dry_run.count_parameters(network) / 1e6
    settings = cfg.model.to_dict()
    settings['architecture'] = network
    if not getattr(network.backbone, 'img_size', None):
        size = _image_size(cfg)
        if size is not None:
            channels = dry_run.input_shape(network)[0]
            settings['input_shape'] = (channels, size, size)
    try:
        model = MODELS.build(settings)
    except Exception:
        # whose fault is it?
        _check_float(_network(cfg), settings)
        raise
    row.quantized = sum(not bits.is_float for bits in model.bits.values())
    row.kept = {
        name: bits.reason or 'bits'
        for name, bits in model.bits.items()
        if bits.is_float
    }
    cost = model.cost
    row.taps = len(model.taps)
    row.layouts = list(dict.fromkeys(tap.layout for tap in model.taps))
    row.guidance_parameters = cost.guidance_parameters / 1e6
    row.guidance_multiply_adds = (
        cost.guidance_multiply_adds / cost.multiply_adds
    )
    return model, settings


def _check_float(network: nn.Module, settings: dict) -> None:
    """Raise NetworkError if the float network does not run."""
    shape = settings.get('input_shape') or dry_run.input_shape(network)
    network.eval()
    try:
        with torch.no_grad():
            network(dry_run.sample(network, shape, BATCH), mode='tensor')
    except Exception as error:
        raise NetworkError(
            f'a forward pass on {shape} fails: {_one_line(error)}'
        ) from error


def _check_conversion(model: JointQAT, shape: Sequence[int]) -> None:
    """With idle quantizers F computes what the float network does."""
    network = model.architecture.eval()
    inputs = dry_run.sample(network, shape, BATCH)
    with torch.no_grad(), dry_run.floating(network):
        quantized = _flat(network(inputs, mode='tensor'))
        floats = _flat(restore(copy.deepcopy(network))(inputs, mode='tensor'))
    for a, b in zip(quantized, floats, strict=True):
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-4):
            raise _Failed('the conversion changes what F computes')


def _data(model: JointQAT, shape: Sequence[int], classes: int) -> dict:
    from mmpretrain.models import MultiLabelClsHead
    from mmpretrain.structures import DataSample

    multi = isinstance(model.architecture.head, MultiLabelClsHead)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (BATCH, *shape), generator=generator, dtype=torch.uint8
    )
    samples = []
    for i in range(BATCH):
        label = i % classes
        sample = DataSample()
        sample.set_gt_label([label] if multi else label)
        sample.set_field(classes, 'num_classes', field_type='metainfo')
        samples.append(sample)
    return model.data_preprocessor(
        dict(inputs=list(images), data_samples=samples), True
    )


def _small_enough(model: JointQAT) -> tuple[int, ...]:
    """The smallest of a few sizes on which F runs."""
    full = model.cost.shape
    small = (full[0], SMALL, SMALL)
    if getattr(model.architecture.backbone, 'img_size', None) is None:
        try:
            with dry_run.floating(model.architecture):
                dry_run.run(
                    model.architecture,
                    dry_run.sample(model.architecture, small),
                )
            return min(full, small)
        except Exception:
            pass
    return full


def _train(cfg: Config, model: JointQAT, settings: dict, row: Row) -> None:
    """The checks that need training steps."""
    random.seed(0)
    model.init_weights()
    shape = _small_enough(model)
    _check_conversion(model, shape)
    model.train()
    classes = model.cost.num_classes
    learned = dict(named_quantizers(model.architecture))
    negative: dict[str, bool] = {}

    def note_sign(name: str, args: tuple) -> None:
        negative.setdefault(name, bool(args[0].min() < 0))

    handles = [
        quantizer.register_forward_pre_hook(
            lambda _, args, name=name: note_sign(name, args)
        )
        for name, quantizer in learned.items()
        if quantizer.role == 'activation'
    ]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE)
    before: dict[str, Tensor] = {}
    for step in range(STEPS):
        torch.manual_seed(step)
        losses = model(**_data(model, shape, classes), mode='loss')
        before = before or {
            name: _scale(q).clone() for name, q in learned.items()
        }
        terms = {k: v for k, v in losses.items() if 'loss' in k}
        bad = [k for k, v in terms.items() if not bool(torch.isfinite(v))]
        if bad:
            raise _Failed(f'step {step + 1}: {bad[0]} is not finite')
        for part in ('student.', 'guidance.'):
            if not any(name.startswith(part) for name in terms):
                raise _Failed(f'no loss {part}*')
        if step == STEPS - 1:
            _check_guidance_gradient(model, terms)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
    for handle in handles:
        handle.remove()
    row.moved = (
        sum(not torch.equal(_scale(q), before[n]) for n, q in learned.items()),
        len(learned),
    )
    if row.moved[0] < row.moved[1]:
        name = next(
            n for n, q in learned.items() if torch.equal(_scale(q), before[n])
        )
        raise _Failed(
            f'{row.moved[1] - row.moved[0]} of {row.moved[1]} learned scales '
            f'did not move, such as {name}'
        )
    row.signed = (sum(negative.values()), len(negative))
    wrong = [n for n, v in negative.items() if bool(learned[n].signed) != v]
    if wrong:
        raise _Failed(f'{wrong[0]} has the wrong sign')
    _check_levels(model, shape)
    _check_dropping(model, settings, cfg, shape)


def _scale(quantizer: nn.Module) -> Tensor:
    return quantizer.step.detach()


def _check_guidance_gradient(model: JointQAT, terms: dict) -> None:
    name, layer = next(
        (name, module)
        for name, module in _running_layers(model)
        if isinstance(module, QuantizedLayer)
    )
    # of a frozen layer, only the scales are trained
    weight = layer.product_weight
    if not weight.requires_grad:
        weight = layer.input_quantizer.step
    # not autograd.grad: reversible networks write .grad in their backward
    model.zero_grad()
    sum(v for k, v in terms.items() if k.startswith('guidance.')).backward(
        retain_graph=True
    )
    gradient = weight.grad
    if gradient is None or not bool(gradient.abs().sum() > 0):
        raise _Failed(f'no gradient of the guidance reaches {name}')
    model.zero_grad()


def _running_layers(model: JointQAT) -> Iterator[tuple[str, nn.Module]]:
    modules = dict(model.architecture.named_modules(remove_duplicate=False))
    for name in model.bits:
        yield name, modules[name]


def _check_levels(model: JointQAT, shape: Sequence[int]) -> None:
    model.eval()
    inputs = torch.randn(BATCH, *shape)
    for count in count_levels(model.architecture, inputs):
        if not count.holds:
            raise _Failed(
                f'{count.name} holds {count.levels} values at {count.bits} bit'
            )


def _check_dropping(
    model: JointQAT, settings: dict, cfg: Config, shape: Sequence[int]
) -> None:
    plain = MODELS.build(
        dict(settings, architecture=_network(cfg), guidance=None)
    )
    # tensor by tensor: LoRA's state dict, for one, leaves out what is frozen
    _copy_tensors(model.architecture, plain.architecture)
    names = {n for n, _ in plain.named_parameters()}
    mine = {
        n for n, _ in model.named_parameters() if not n.startswith('guidance.')
    }
    if names != mine:
        raise _Failed('F has other parameters than without guidance')
    plain.eval()
    inputs = torch.randn(BATCH, *shape)
    with torch.no_grad():
        pairs = zip(
            _flat(model(inputs, mode='tensor')),
            _flat(plain(inputs, mode='tensor')),
            strict=True,
        )
        if not all(torch.equal(a, b) for a, b in pairs):
            raise _Failed('F gives other logits without guidance')


@torch.no_grad()
def _copy_tensors(source: nn.Module, target: nn.Module) -> None:
    values = dict(source.named_parameters()) | dict(source.named_buffers())
    for tensors in (target.named_parameters(), target.named_buffers()):
        for name, tensor in tensors:
            tensor.copy_(values[name])
    for _, quantizer in named_quantizers(target):
        quantizer._restore()


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for inner in value for tensor in _flat(inner)]


# --- many configs ----------------------------------------------------------


def sweep(
    configs: Sequence[str],
    job: Callable[..., Row] = try_config,
    jobs: int = 1,
    timeout: float = 600.0,
    memory: float | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
    **arguments: Any,
) -> list[Row]:
    """Try every config in a process of its own.

    Args:
        configs: As from :func:`classifier_configs`.
        job: What is done with each; called with a config and ``arguments``.
        jobs: Processes at a time.
        timeout: Seconds after which a config is given up.
        memory: Address space of a process in GiB; unlimited if ``None``.
        on_row: Called as soon as a row is there.

    Returns:
        A row for each config, in the order of ``configs``.
    """
    import mmpretrain.models  # noqa: F401  (once, before forking)

    context = multiprocessing.get_context('fork')
    waiting = list(configs)[::-1]
    running: dict[Connection, tuple[Any, str, float]] = {}
    rows: dict[str, Row] = {}
    while waiting or running:
        while waiting and len(running) < max(jobs, 1):
            config = waiting.pop()
            ours, theirs = context.Pipe(False)
            process = context.Process(
                target=_child, args=(theirs, job, config, memory, arguments)
            )
            process.start()
            theirs.close()
            running[ours] = (process, config, time.time())
        for pipe in wait(list(running), timeout=0.5):
            process, config, started = running.pop(pipe)
            try:
                row = pipe.recv()
            except EOFError:
                process.join()
                row = Row(
                    config,
                    reason=f'its process ended with {process.exitcode} '
                    '(out of memory?)',
                    seconds=time.time() - started,
                )
            process.join()
            rows[config] = row
            on_row(row)
        for pipe, (process, config, started) in list(running.items()):
            if time.time() - started > timeout:
                process.kill()
                process.join()
                del running[pipe]
                rows[config] = Row(
                    config,
                    reason=f'given up after {timeout:.0f} s',
                    seconds=time.time() - started,
                )
                on_row(rows[config])
    return [rows[config] for config in configs]


def _child(
    pipe: Connection,
    job: Callable[..., Row],
    config: str,
    memory: float | None,
    arguments: dict,
) -> None:
    if memory is not None:
        limit = int(memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with _quiet():
        row = job(config, **arguments)
    pipe.send(row)
    pipe.close()


@contextmanager
def _quiet() -> Iterator[None]:
    import logging
    import warnings

    if not os.environ.get('MMAUXQ_SWEEP_DEBUG'):
        logging.disable(logging.CRITICAL)
        with open(os.devnull, 'w') as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
    warnings.simplefilter('ignore')
    yield


def smallest_of_each_type(
    configs: dict[str, str], jobs: int = 1, **arguments: Any
) -> list[str]:
    """One config per type of backbone: the one with fewest parameters.

    Configs whose network does not build, or has no head, are left out if
    there is another.
    """
    rows = sweep(list(configs), count_only, jobs, **arguments)
    best: dict[str, Row] = {}
    for row in rows:
        kind = configs[row.config]
        key = (row.verdict != 'pass', row.parameters, row.config)
        old = best.get(kind)
        if old is None or key < (
            old.verdict != 'pass',
            old.parameters,
            old.config,
        ):
            best[kind] = row
    return [best[kind].config for kind in sorted(best)]


# --- the table -------------------------------------------------------------


def as_markdown(rows: Sequence[Row]) -> str:
    """The table, with the reasons below it."""
    lines = [
        '| backbone | config | F, M parameters | quantized / float layers '
        '| taps | H, M parameters | H, multiply-adds | signed inputs '
        '| s | verdict |',
        '|---|---|--:|--:|---|--:|--:|--:|--:|---|',
    ]
    for row in rows:
        taps = f'{row.taps} ({", ".join(row.layouts)})' if row.taps else '-'
        lines.append(
            f'| {row.backbone} | {row.config} | {row.parameters:.2f} '
            f'| {row.quantized} / {len(row.kept)} | {taps} '
            f'| {row.guidance_parameters:.2f} '
            f'| {row.guidance_multiply_adds:+.1%} '
            f'| {row.signed[0]} of {row.signed[1]} '
            f'| {row.seconds:.0f} | {row.verdict} |'
        )
    usual = ('first layer', 'classifier')
    notes = []
    for row in rows:
        if row.reason:
            notes.append(f'* {row.config}: {row.verdict}, {row.reason}')
        odd: dict[str, list[str]] = {}
        for name, reason in row.kept.items():
            if reason not in usual:
                odd.setdefault(reason, []).append(name)
        for reason, names in odd.items():
            more = f' and {len(names) - 1} more' if names[1:] else ''
            notes.append(
                f'* {row.config}: float are {names[0]}{more}: {reason}'
            )
    good = sum(row.verdict == 'pass' for row in rows)
    lines += ['', f'{good} of {len(rows)} pass.', '', *notes]
    return '\n'.join(lines).rstrip() + '\n'


def as_json_lines(rows: Sequence[Row]) -> str:
    """One object per row."""
    return ''.join(json.dumps(asdict(row)) + '\n' for row in rows)


def from_json_lines(text: str) -> list[Row]:
    """Undo :func:`as_json_lines`."""
    return [Row(**json.loads(line)) for line in text.splitlines()]
