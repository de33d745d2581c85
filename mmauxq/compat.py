"""Every work-around for torch, MMEngine, MMPretrain and MMRazor.

No other file patches a third-party package. Each function says what it does,
why, until which version, and where the trouble is reported; a test in
``tests/test_compat.py`` fails as soon as one is no longer needed.

Tested with torch 2.11, mmengine 0.10.7 (onedl-mmengine 0.10.12), mmpretrain
1.2.0 (onedl-mmpretrain 1.3.6), mmcv-lite 2.1.0 and mmrazor 1.0.0.
"""

import importlib
import importlib.util
import os
import warnings
from functools import partialmethod
from typing import Any
from weakref import WeakKeyDictionary

from .files import write_atomically


def enable() -> None:
    """Apply all work-arounds that training and testing need; idempotent."""
    register_config_scope()
    silence_neighbours()
    enable_safe_checkpoints()
    write_files_atomically()
    spare_scales_from_decay()
    read_losses_when_asked()
    append_to_histories_in_place()


def silence_neighbours() -> None:
    """Hide two warnings that would stand above every one-line error.

    What: that mmcv-lite has no compiled operators (we use none), and that
    mmengine's ``pkg_resources`` is deprecated (setuptools is held below 82).

    Until: mmcv > 2.1.0, https://github.com/open-mmlab/mmcv/issues/3310, and
    mmengine > 0.10.7, https://github.com/open-mmlab/mmcv/issues/3325
    """
    for message in (
        'Fail to import ``MultiScaleDeformableAttention``',
        'pkg_resources is deprecated as an API',
    ):
        warnings.filterwarnings('ignore', message=message)


# --- configs ---------------------------------------------------------------


def register_config_scope() -> None:
    """Let ``_base_ = 'mmauxq::...'`` find the configs of this package.

    Why: MMEngine's table of packages is closed. For a module, such as
    ``mmauxq.version``, MMEngine takes its folder, which is right for every
    kind of install; for a distribution it guesses ``site-packages/mmauxq``.

    Until: MMEngine takes any package (mmengine <= 0.10.7 and onedl-mmengine
    <= 0.10.12 do not). https://github.com/open-mmlab/mmengine/issues/1410
    """
    from mmengine.config.utils import MODULE2PACKAGE

    MODULE2PACKAGE.setdefault('mmauxq', 'mmauxq.version')


def needs_pkg_resources(error: BaseException) -> bool:
    """Whether ``pkg::`` bases failed because setuptools is too new.

    Why: mmengine 0.10.7 looks packages up through ``pkg_resources``, which
    setuptools 82 removed. The onedl fork does not need it.

    Until: mmengine > 0.10.7. https://github.com/open-mmlab/mmcv/issues/3325
    """
    return getattr(error, 'name', None) == 'pkg_resources'


# --- mmrazor on a new torch ------------------------------------------------


def enable_mmrazor() -> None:
    """Make ``import mmrazor.models`` work; changes nothing that exists.

    Why: mmrazor 1.0.0 imports symbols of ``torch.ao`` that torch has renamed
    or dropped since 1.13. Its losses and connectors, which we use, do not
    need them, so that aliases are enough.

    Until: mmrazor > 1.0.0 imports by itself on torch >= 2.0, or torch drops
    ``torch.ao.quantization`` (then the error below says so).
    https://github.com/open-mmlab/mmrazor/issues/615

    Raises:
        ImportError: If mmrazor cannot be imported, with the true cause.
    """
    try:
        _alias_torch_ao()
        importlib.import_module('mmrazor.models')
        _mend_soft_cross_entropy()
    except (ImportError, AttributeError) as error:
        import torch

        cause = _cause_behind_placeholder(error)
        raise ImportError(
            f'mmrazor does not import on torch {torch.__version__}: '
            f'{type(cause).__name__}: {cause}'
        ) from error


def _alias_torch_ao() -> None:
    # Used by set_backend_pattern_config, which does not import it.
    import torch.ao.quantization.backend_config.utils  # noqa: F401
    import torch.ao.quantization.fuser_method_mappings as mappings
    from torch.ao.quantization.backend_config import BackendPatternConfig

    def reverse_sequential_wrapper2(sequential):
        return mappings._reverse2(mappings._sequential_wrapper2(sequential))

    def set_attribute(self, value, attribute):
        setattr(self, attribute, value)
        return self

    missing = {
        (mappings, 'reverse2'): mappings._reverse2,
        (mappings, 'reverse3'): mappings._reverse3,
        (mappings, 'reverse_sequential_wrapper2'): reverse_sequential_wrapper2,
    }
    for attribute in (
        '_input_output_observed',
        '_overwrite_output_fake_quantize',
        '_overwrite_output_observer',
    ):
        setter = partialmethod(set_attribute, attribute=attribute)
        missing[BackendPatternConfig, f'_set{attribute}'] = setter
    for (owner, name), alias in missing.items():
        if not hasattr(owner, name):
            setattr(owner, name, alias)


def _mend_soft_cross_entropy() -> None:
    """Let mmrazor's ``KDSoftCELoss`` compute.

    Why: it calls a function of mmcls, the former name of mmpretrain.

    Until: mmrazor > 1.0.0 imports mmpretrain.
    """
    from mmpretrain.models.losses.cross_entropy_loss import soft_cross_entropy
    from mmrazor.models.losses import kd_soft_ce_loss

    if importlib.util.find_spec('mmcls') is None:
        kd_soft_ce_loss.soft_cross_entropy = soft_cross_entropy


def _cause_behind_placeholder(error: BaseException) -> BaseException:
    """The error of torch behind one of mmrazor.

    mmrazor puts a placeholder where an import fails; its use says only
    "`torch>=1.13` is not installed properly". The import is done again, with
    the failure itself in place of that placeholder.
    """
    if 'is not installed properly' not in str(error):
        return error
    from mmrazor import utils

    def placeholder(package: str) -> type:
        if f'`{package}`' in str(error):
            raise
        return object

    utils.get_placeholder = utils.get_package_placeholder = placeholder
    try:
        importlib.import_module('mmrazor.models')
    except ImportError as cause:
        return cause
    return error


# --- checkpoints -----------------------------------------------------------


def enable_safe_checkpoints() -> None:
    """Let every checkpoint come through ``read_checkpoint``, and resume ours.

    What: the loaders of MMEngine, for files and for addresses, read with
    :func:`mmauxq.checkpoint_file.read_source`; ``Runner.resume`` is
    :func:`mmauxq.engine.resume.resume`, since MMEngine's runs a config that
    the file holds; and any other ``torch.load`` of the process is made safe
    through torch's own environment switch, also with ``weights_only=False``.

    Why: torch >= 2.6 refuses MMEngine's own checkpoints. onedl-mmengine
    allow-lists ``getattr`` and ``numpy.dtype`` for each load and answers a
    refusal by loading unsafely.

    Until: MMEngine stores plain types, and believes none that it reads
    (0.10.7 and onedl 0.10.12 do not).
    https://github.com/open-mmlab/mmengine/issues/1655
    """
    from mmengine.runner import Runner, checkpoint

    from .checkpoint_file import read_source
    from .engine.resume import resume

    os.environ.pop('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None)
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'

    def load(filename: str, map_location: Any = None) -> Any:
        return read_source(filename)

    def load_url(url: str, model_dir: str | None = None, **_: Any) -> Any:
        return read_source(url, model_dir)

    loader = checkpoint.CheckpointLoader
    remote = [r'(\S+\:)?s3://', r'(\S+\:)?petrel://', 'pavi://']
    loader.register_scheme(['', *remote], load, force=True)
    checkpoint.load_url = load_url
    checkpoint.get_torch_safe_globals = list  # onedl
    Runner.resume = resume


def write_files_atomically() -> None:
    """Make MMEngine write files complete or not at all.

    Why: its local backend opens the file and writes, so that a killed run or
    a full disk leaves half a checkpoint under the name of a good one, often
    of the one that it overwrites.

    Until: MMEngine writes beside the file and renames (0.10.7 and onedl
    0.10.12 do not).
    """
    from mmengine.fileio import LocalBackend, register_backend

    class AtomicLocalBackend(LocalBackend):
        """LocalBackend whose files are complete or absent."""

        def put(self, obj, filepath) -> None:
            write_atomically(filepath, bytes(obj))

        def put_text(self, obj, filepath, encoding='utf-8') -> None:
            write_atomically(filepath, obj.encode(encoding))

    register_backend('local', AtomicLocalBackend, force=True, prefixes='')


# --- losses ----------------------------------------------------------------


def read_losses_when_asked() -> None:
    """Let MMEngine fetch losses and norms from a GPU when they are read.

    What: its message hub keeps tensors until then; an optimizer that clips
    gradients hands their norm over as a tensor.

    Why: it asks for each value in each step. The host waits for the GPU, and
    the GPU then for the host to launch the next step, which takes as long as
    the step of a small network.

    Until: the hub keeps tensors (0.10.7 and onedl 0.10.12 do not).
    """
    from mmengine.logging import MessageHub
    from mmengine.optim import OptimWrapper

    update, save = MessageHub.update_scalar, MessageHub.state_dict
    get = MessageHub.get_scalar
    if update.__module__ == __name__:
        return

    def update_scalar(
        self, key: str, value: Any, count: int = 1, resumed: bool = True
    ) -> None:
        kept = vars(self).setdefault('_kept', {})
        if _is_on_gpu(value) and len(kept.get(key, ())) < 100:
            kept.setdefault(key, []).append((value.detach(), count, resumed))
            return
        if key in kept:
            fetch(self)
        update(self, key, value, count, resumed)

    def fetch(hub: Any) -> None:
        import torch

        kept, hub._kept = vars(hub).get('_kept', {}), {}
        entries = [(key, *entry) for key in kept for entry in kept[key]]
        if entries:
            values = torch.stack([x.reshape(()) for _, x, *_ in entries])
            for (key, _, *more), value in zip(
                entries, values.tolist(), strict=True
            ):
                update(hub, key, value, *more)

    def state_dict(self) -> dict:
        fetch(self)
        return save(self)

    def get_scalar(self, key: str) -> Any:
        # that of another key, such as the time that each step reads, waits
        # for none
        if key in vars(self).get('_kept', {}) or key not in self._log_scalars:
            return get(self, key)
        return self._log_scalars[key]

    def log_scalars(self) -> Any:
        fetch(self)
        return self._log_scalars

    clip = OptimWrapper._clip_grad

    def clip_grad(self) -> None:
        norms, clip_func = [], self.clip_func
        # one that returns nothing has nothing to be logged
        self.clip_func = lambda *a, **k: norms.append(clip_func(*a, **k))
        try:
            clip(self)
        finally:
            self.clip_func = clip_func
        for norm in norms:
            if norm is not None:
                self.message_hub.update_scalar(f'train/{self.grad_name}', norm)

    OptimWrapper._clip_grad = clip_grad
    MessageHub.update_scalar = update_scalar
    MessageHub.state_dict = state_dict
    MessageHub.get_scalar = get_scalar
    MessageHub.log_scalars = property(log_scalars)


def _is_on_gpu(value: Any) -> bool:
    return getattr(value, 'is_cuda', False) and value.numel() == 1


def append_to_histories_in_place() -> None:
    """Let the history of a logged number grow without a copy of it.

    What: arrays of a ``HistoryBuffer`` become views of larger ones.

    Why: MMEngine copies the whole history for each value. That of an epoch,
    with thousands of steps, takes the host some tenths of a millisecond in
    each step for all numbers together.

    Until: MMEngine appends in place (0.10.7 and onedl 0.10.12 do not).
    """
    from mmengine.logging import HistoryBuffer

    copying = HistoryBuffer.update
    if copying.__module__ == __name__:
        return
    # not in the buffers, which are saved with all that they hold
    spaces: WeakKeyDictionary = WeakKeyDictionary()

    def update(self, log_val: float, count: float = 1) -> None:
        values = dict(_log_history=log_val, _count_history=count)
        if not all(isinstance(v, (int, float)) for v in values.values()):
            copying(self, log_val, count)  # refuses it
        own = spaces.setdefault(self, {})
        for name, value in values.items():
            if name not in own or own[name].view is not getattr(self, name):
                own[name] = _Growing(getattr(self, name))
            setattr(self, name, own[name].append(value, self.max_length))

    HistoryBuffer.update = update


class _Growing:
    """An array with space for more behind it."""

    def __init__(self, values: Any) -> None:
        self.view = values
        self._space, self._end = values, len(values)

    def append(self, value: float, most: int) -> Any:
        """The last ``most`` values, after this one; those of before stay."""
        import numpy as np

        kind = self._space.dtype
        if kind.kind != 'f':
            kind = np.result_type(kind, np.asarray(value).dtype)
        if self._end == len(self._space) or kind != self._space.dtype:
            before = self.view
            self._space = np.empty(max(1024, 2 * len(before)), kind)
            self._end = len(before)
            self._space[: self._end] = before
        self._space[self._end] = value
        self._end += 1
        first = self._end - min(len(self.view) + 1, most)
        self.view = self._space[first : self._end]
        return self.view


# --- weight decay ----------------------------------------------------------


def spare_scales_from_decay() -> None:
    """Let no optimizer that MMEngine builds decay the scales of quantizers.

    What: after ``build_optim_wrapper``, whatever constructor a config names,
    :func:`mmauxq.engine.optimizers.spare_scales` sets the groups of scales
    apart. Without quantizers nothing changes.

    Why: learned scales must not decay, and recipes inherit the optimizer of an
    mmpretrain config, with its constructor, unchanged.

    Until: MMEngine lets a module say which parameters do not decay (0.10.7
    and onedl 0.10.12 do not).
    """
    from mmengine import optim
    from mmengine.optim import optimizer
    from mmengine.optim.optimizer import builder
    from mmengine.runner import runner

    from .engine.optimizers import spare_scales

    build = builder.build_optim_wrapper
    if build.__module__ == __name__:
        return

    def build_optim_wrapper(model: Any, cfg: dict) -> Any:
        wrapper = build(model, cfg)
        paramwise = cfg.get('paramwise_cfg') or {}
        keys = (paramwise.get('custom_keys') or {}).items()
        several = isinstance(wrapper, optim.OptimWrapperDict)
        for each in wrapper.values() if several else [wrapper]:
            spare_scales(each.optimizer, model, keys)
        return wrapper

    for module in (optim, optimizer, builder, runner):
        module.build_optim_wrapper = build_optim_wrapper
