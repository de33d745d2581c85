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
import pickle
import warnings
from functools import partialmethod
from pathlib import Path
from typing import Any

from .checkpoint_file import BadFile, inspect
from .errors import UsageError
from .files import write_atomically


def enable() -> None:
    """Apply all work-arounds that training and testing need; idempotent."""
    register_config_scope()
    silence_neighbours()
    enable_safe_checkpoints()
    write_files_atomically()
    default_optim_constructor()


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


# --- checkpoints under weights_only=True -----------------------------------


class _PickledDtype:
    """Stands in for ``numpy.dtype`` while a checkpoint is unpickled.

    numpy's own ``dtype.__setstate__`` trusts its argument: a crafted state
    turns float64 into a record of object pointers that are then read from
    raw bytes. This one takes plain numbers and a byte order, no more.
    """

    def __init__(self, code: str, align: bool = False, copy: bool = True):
        import numpy as np

        if not isinstance(code, str) or np.dtype(code).kind not in 'biufc':
            raise pickle.UnpicklingError(
                f'numpy data of type {code!r} (allowed: plain numbers)'
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        order = state[1]
        if order not in ('<', '>', '|', '=') or any(state[2:5]):
            raise pickle.UnpicklingError(f'a numpy dtype of state {state!r}')
        self.dtype = self.dtype.newbyteorder(order)


def _unpickle_scalar(dtype: _PickledDtype, raw: bytes):
    import numpy as np

    return np.frombuffer(raw, dtype.dtype, count=1)[0]


def _pickled_array_class() -> type:
    """The class of arrays read from a checkpoint (made once)."""
    import numpy as np

    class PickledArray(np.ndarray):
        """An array whose pickled state is checked before numpy sees it."""

        def __setstate__(self, state: tuple) -> None:  # type: ignore
            version, shape, dtype, fortran, raw = state
            if type(dtype) is not _PickledDtype or type(raw) is not bytes:
                raise pickle.UnpicklingError('an array that is not numbers')
            super().__setstate__((version, shape, dtype.dtype, fortran, raw))

        def __reduce__(self) -> tuple:  # type: ignore
            return self.view(np.ndarray).__reduce__()

    return PickledArray


def enable_safe_checkpoints() -> None:
    """Load and resume checkpoints under ``weights_only=True``, always.

    What: allow-lists what MMEngine stores beside tensors - HistoryBuffer and
    numpy numbers - through stand-ins that accept nothing else; makes every
    loader of the process safe through torch's own environment switch, also
    those that ask for ``weights_only=False``; gives local files the one-line
    errors of :func:`load_checkpoint`; and makes HistoryBuffer store its data
    alone, so that new checkpoints do not name ``builtins.getattr``.

    Why: torch >= 2.6 refuses MMEngine's own checkpoints. onedl-mmengine
    allow-lists the real ``getattr`` and ``numpy.dtype`` for each load and
    answers a refusal by loading unsafely; its list is emptied here.

    Until: MMEngine stores plain types (0.10.7 and onedl 0.10.12 do not).
    https://github.com/open-mmlab/mmengine/issues/1655
    """
    import torch

    # Outside the guard: somebody may have changed the environment since.
    os.environ.pop('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None)
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
    if getattr(enable_safe_checkpoints, 'done', False):
        return

    import numpy as np
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import checkpoint as mmengine_checkpoint

    array_class = _pickled_array_class()

    def reconstruct(cls: type, shape: tuple, typecode: Any):
        if cls is not array_class:
            raise pickle.UnpicklingError(f'a numpy array of class {cls!r}')
        return np.ndarray.__new__(array_class, (0,), 'b')

    def history_method(owner: Any, name: str):
        # Protocol 2 writes the function HistoryBuffer.min as
        # getattr(HistoryBuffer, 'min').
        methods = HistoryBuffer._statistics_methods
        if owner is not HistoryBuffer or name not in (
            {'min', 'max', 'mean', 'current'} | set(methods)
        ):
            raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r})')
        return getattr(HistoryBuffer, name)

    stand_ins = [
        HistoryBuffer,
        (history_method, 'builtins.getattr'),
        (history_method, '__builtin__.getattr'),
        (array_class, 'numpy.ndarray'),
        (_PickledDtype, 'numpy.dtype'),
    ]
    for core in ('numpy.core', 'numpy._core'):  # numpy 1.x, numpy 2.x
        stand_ins.append((reconstruct, f'{core}.multiarray._reconstruct'))
        stand_ins.append((_unpickle_scalar, f'{core}.multiarray.scalar'))
    torch.serialization.add_safe_globals(stand_ins)

    def get_state(self) -> dict:
        state = dict(self.__dict__)
        state.pop('statistics_methods', None)
        return state

    def set_state(self, state: dict) -> None:
        self._set_default_statistics()
        for key in ('max_length', '_log_history', '_count_history'):
            value = state[key]
            if isinstance(value, np.ndarray):
                value = np.array(value)
            self.__dict__[key] = value

    HistoryBuffer.__getstate__ = get_state
    HistoryBuffer.__setstate__ = set_state

    def load_from_local(filename, map_location):
        return load_checkpoint(filename, map_location)

    mmengine_checkpoint.CheckpointLoader.register_scheme(
        '', load_from_local, force=True
    )
    if hasattr(mmengine_checkpoint, 'get_torch_safe_globals'):  # onedl
        mmengine_checkpoint.get_torch_safe_globals = list
    enable_safe_checkpoints.done = True  # type: ignore[attr-defined]


def load_checkpoint(path, map_location='cpu') -> Any:
    """Read a checkpoint file, or say in one line why not.

    Args:
        path: A local file.
        map_location: As in :func:`torch.load`.

    Raises:
        UsageError: If the file is missing, unreadable, truncated, no
            checkpoint, or holds anything but tensors, plain Python types and
            MMEngine's own records. In no case is its code run.
    """
    import torch

    enable_safe_checkpoints()
    file = Path(path).expanduser()
    if not file.exists():
        raise UsageError(f'checkpoint {file} does not exist')
    if not file.is_file():
        raise UsageError(f'checkpoint {file} is not a file')
    try:
        inspect(file)
        return torch.load(file, map_location=map_location, weights_only=True)
    except BadFile as error:
        if error.reason is None:
            raise UsageError(
                f'checkpoint {file} is truncated or not a checkpoint'
            ) from error
        raise UsageError(_refused(file, error.reason)) from error
    except PermissionError as error:
        raise UsageError(f'checkpoint {file} may not be read') from error
    except pickle.UnpicklingError as error:
        reason = _refusal(error)
        if reason is None:
            raise UsageError(
                f'checkpoint {file} is truncated or not a checkpoint'
            ) from error
        raise UsageError(_refused(file, reason)) from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # A damaged file can fail in any way: zip directory, pickle
        # opcodes, storage sizes.
        if 'CUDA' in str(error):
            raise
        raise UsageError(
            f'checkpoint {file} is truncated or not a checkpoint '
            f'({type(error).__name__})'
        ) from error


def _refused(file: Path, reason: str) -> str:
    return (
        f'checkpoint {file} is refused because it holds {reason}; allowed '
        'are tensors, plain Python types and what MMEngine stores'
    )


def _refusal(error: pickle.UnpicklingError) -> str | None:
    """What the safe loader found and did not allow; None if just damaged."""
    text = str(error)
    for mark in ('GLOBAL ', 'getattr(', 'a numpy', 'an array', 'numpy data'):
        start = text.find(mark)
        if start >= 0:
            found = text[start:].removeprefix('GLOBAL ').split('\n')[0]
            return found.split(' was not an allowed')[0][:120]
    if 'unrecognized function' in text or 'allowlisted' in text:
        return 'a call of an object that is no class of a checkpoint'
    return None


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


# --- weight decay ----------------------------------------------------------


def default_optim_constructor() -> None:
    """Make the default optimizer constructor spare quantizer scales.

    Why: learned scales must not decay, and a recipe cannot name a constructor,
    since it inherits the optimizer of an mmpretrain config unchanged. Without
    quantizers the replacement does what MMEngine's own does.

    Until: MMEngine lets a module say which parameters do not decay (0.10.7
    and onedl 0.10.12 do not).
    """
    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS

    from .engine.optimizers import QuantizerAwareOptimWrapperConstructor

    OPTIM_WRAPPER_CONSTRUCTORS.register_module(
        name='DefaultOptimWrapperConstructor',
        module=QuantizerAwareOptimWrapperConstructor,
        force=True,
    )
