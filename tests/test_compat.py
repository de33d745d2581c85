"""Work-arounds: that they work, and that they are still needed."""

import io
import os
import pickle
import warnings
from importlib.metadata import version

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from packaging.version import Version

from mmauxq import compat
from mmauxq.errors import UsageError
from tests.support.children import in_children


@pytest.fixture(autouse=True)
def safe_checkpoints():
    compat.enable_safe_checkpoints()


# --- mmrazor ---------------------------------------------------------------


MMRAZOR = {
    'imports': """
from mmauxq import compat
compat.enable_mmrazor()
compat.enable_mmrazor()
import mmrazor.models as m
print(m.BaseAlgorithm.__name__, m.SingleTeacherDistill.__name__)
""",
    'plain': 'import mmrazor.models',
    'soft cross entropy': """
import torch
from mmauxq import compat
compat._mend_soft_cross_entropy, mend = (
    lambda: None), compat._mend_soft_cross_entropy
compat.enable_mmrazor()
from mmrazor.models.losses import KDSoftCELoss
x, y = torch.randn(2, 4, 10)
try: KDSoftCELoss()(x, y); print("remove the work-around")
except TypeError: pass
mend()
expected = -(y.softmax(1) * x.log_softmax(1)).sum(1).mean()
torch.testing.assert_close(KDSoftCELoss()(x, y), expected)
print("computes")
""",
    # Without the alias mmrazor says only "torch>=1.13 is not installed".
    'failure': """
from mmauxq import compat
compat._alias_torch_ao = lambda: None
try: compat.enable_mmrazor()
except ImportError as error: print(error)
""",
}
"""Each in a fresh process: what is patched once stays so."""


def test_mmrazor_needs_compat_and_works_with_it(tmp_path):
    done = in_children(tmp_path, 'import mmpretrain.models', MMRAZOR)
    plain = done['plain']
    assert plain.returncode != 0, 'remove compat.enable_mmrazor'
    assert 'ImportError' in plain.stderr
    assert done['imports'].stdout.split() == [
        'BaseAlgorithm',
        'SingleTeacherDistill',
    ], done['imports'].stderr
    soft = done['soft cross entropy']
    assert soft.stdout.split('\n')[-2:] == ['computes', ''], soft.stderr
    assert 'remove' not in soft.stdout
    failure = done['failure']
    assert (
        "cannot import name 'reverse2' from "
        "'torch.ao.quantization.fuser_method_mappings'" in failure.stdout
    ), failure.stderr


def test_existing_torch_symbols_are_left_alone(monkeypatch):
    import torch.ao.quantization.fuser_method_mappings as mappings

    mine = object()
    monkeypatch.setattr(mappings, 'reverse2', mine, raising=False)
    compat._alias_torch_ao()
    assert mappings.reverse2 is mine


def test_aliases_reverse_their_arguments():
    compat._alias_torch_ao()
    import torch.ao.quantization.fuser_method_mappings as mappings

    fuse = mappings.reverse_sequential_wrapper2(lambda *modules: modules)
    assert fuse(False, 'relu', 'conv') == ('conv', 'relu')
    assert mappings.reverse2(lambda q, a, b: (a, b))(False, 1, 2) == (2, 1)


# --- configs ---------------------------------------------------------------


def test_config_scope_is_needed_and_resolves(run_python):
    code = (
        'from mmengine.config.utils import MODULE2PACKAGE as t\n'
        'from mmengine.utils import get_installed_path\n'
        'print("mmauxq" in t)\n'
        'import mmauxq\n'
        'print(get_installed_path(t["mmauxq"]) == '
        'mmauxq.__file__[:-len("/__init__.py")])'
    )
    done = run_python('-c', code)
    needed, resolves = done.stdout.split()
    assert needed == 'False', 'remove compat.register_config_scope'
    assert resolves == 'True', done.stderr


def test_needs_pkg_resources():
    error = ModuleNotFoundError('x', name='pkg_resources')
    assert compat.needs_pkg_resources(error)
    assert not compat.needs_pkg_resources(ModuleNotFoundError('x', name='y'))
    assert not compat.needs_pkg_resources(ValueError())


# --- safe checkpoints ------------------------------------------------------


def history(values=(1.0, 2.0)) -> HistoryBuffer:
    return HistoryBuffer(list(values), [1] * len(values))


def message_hub_state() -> dict:
    return {
        'loss': history(),
        'scalar': np.float64(0.5),
        'ints': np.arange(3),
        'matrix': np.asfortranarray(np.ones((2, 3), np.float32)),
        'big endian': np.arange(3, dtype='>i4'),
        'flag': np.bool_(True),
    }


def old_save(state, path, monkeypatch) -> None:
    """Save as MMEngine without our patch does."""
    with monkeypatch.context() as patch:
        patch.setattr(
            HistoryBuffer,
            '__getstate__',
            lambda self: {
                **self.__dict__,
                'statistics_methods': self._statistics_methods,
            },
        )
        torch.save(state, path)


@pytest.mark.parametrize('core', ['numpy._core', 'numpy.core'])
@pytest.mark.parametrize('saved_by', ['plain mmengine', 'mmauxq'])
def test_what_mmengine_stores_loads(tmp_path, monkeypatch, saved_by, core):
    path = tmp_path / 'a.pth'
    state = message_hub_state()
    if saved_by == 'plain mmengine':
        old_save(state, path, monkeypatch)
        assert b'getattr' in path.read_bytes()
    else:
        torch.save(state, path)
        assert b'getattr' not in path.read_bytes()
    # numpy 1.x and 2.x name their functions differently; torch rewrites the
    # zip, so only the pickle inside is renamed.
    rename_numpy(path, core)
    loaded = compat.load_checkpoint(path)
    assert loaded['loss'].data[0].tolist() == [1.0, 2.0]
    assert type(loaded['loss'].data[0]) is np.ndarray
    assert loaded['loss'].statistics('mean') == 1.5
    loaded['loss'].update(3.0)
    assert loaded['loss'].max() == 3.0
    for key in ('scalar', 'ints', 'matrix', 'big endian', 'flag'):
        np.testing.assert_array_equal(loaded[key], state[key])
        # numpy itself swaps bytes to the native order on loading
        assert loaded[key].dtype == state[key].dtype.newbyteorder('=')
    # what was loaded can be saved and loaded again, by anybody
    again = io.BytesIO()
    torch.save(loaded, again)
    assert b'mmauxq' not in again.getvalue()


def rename_numpy(path, core) -> None:
    import zipfile

    with zipfile.ZipFile(path) as source:
        items = {i.filename: source.read(i) for i in source.infolist()}
    with zipfile.ZipFile(path, 'w') as target:
        for name, data in items.items():
            if name.endswith('data.pkl'):
                for old in (b'numpy._core.', b'numpy.core.'):
                    data = data.replace(old, core.encode() + b'.')
            target.writestr(name, data)


def test_statistics_of_a_file_do_not_replace_ours(tmp_path, monkeypatch):
    buffer = history()
    buffer.statistics_methods = {'min': HistoryBuffer.max}
    with monkeypatch.context() as patch:
        patch.setattr(HistoryBuffer, '__getstate__', lambda s: s.__dict__)
        torch.save(buffer, tmp_path / 'a.pth')
    assert compat.load_checkpoint(tmp_path / 'a.pth').statistics('min') == 1.0


class Call:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function, *arguments, state=None):
        self.value = (function, arguments)
        if state is not None:
            self.value += (state,)

    def __reduce__(self):
        return self.value


def marker_command(tmp_path) -> str:
    return f'touch {tmp_path / "ran"}'


def attack_system(tmp_path):
    return Call(os.system, marker_command(tmp_path))


def attack_getattr_of_module(tmp_path):
    return Call(getattr, Call(__import__, 'os'), 'system')


def attack_getattr_of_other_class(tmp_path):
    return Call(getattr, torch.Size, '__new__')


def attack_getattr_private(tmp_path):
    return Call(getattr, HistoryBuffer, '__init__')


def attack_getattr_chain(tmp_path):
    method = Call(getattr, HistoryBuffer, 'mean')
    return Call(getattr, Call(getattr, method, '__globals__'), 'get')


def attack_eval(tmp_path):
    return Call(eval, f'__import__("os").system("{marker_command(tmp_path)}")')


def attack_object_dtype(tmp_path):
    return np.array([attack_system(tmp_path)], dtype=object)


def attack_dtype_state(tmp_path):
    # numpy itself would now read raw bytes as object pointers
    fields = {'a': (Call(np.dtype, 'i8', False, True), 0)}
    state = (3, '|', None, ('a',), fields, 8, 8, 63)
    return Call(np.dtype, 'f8', False, True, state=state)


def attack_void_dtype(tmp_path):
    return np.zeros(2, dtype='V8')


def attack_array_class(tmp_path):
    reconstruct = np.zeros(1).__reduce__()[0]
    return Call(reconstruct, HistoryBuffer, (0,), b'b')


ATTACKS = [f for name, f in list(globals().items()) if 'attack_' in name]


@pytest.mark.parametrize('attack', ATTACKS, ids=lambda f: f.__name__[7:])
@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
def test_malicious_checkpoint_is_refused(tmp_path, attack, legacy):
    path = tmp_path / 'evil.pth'
    save_pickle(
        {'state_dict': {}, 'meta': attack(tmp_path)},
        path,
        legacy,
    )
    from mmengine.runner import load_checkpoint

    readers = [
        lambda: compat.load_checkpoint(path),
        lambda: load_checkpoint(torch.nn.Linear(1, 1), str(path)),
    ]
    for read in readers:
        with pytest.raises(UsageError) as caught:
            read()
        assert '\n' not in str(caught.value)
        assert str(path) in str(caught.value)
        assert 'refused because it holds' in str(caught.value)
    # every other loader of the process, also one that asks for trouble
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    assert not (tmp_path / 'ran').exists()


def save_pickle(obj, path, legacy) -> None:
    torch.save(obj, path, _use_new_zipfile_serialization=not legacy)


def test_the_attack_would_work_without_protection(tmp_path):
    """The marker file is a fair witness."""
    buffer = pickle.dumps(attack_system(tmp_path))
    pickle.loads(buffer)
    assert (tmp_path / 'ran').exists()


def test_numpy_dtype_still_trusts_its_state():
    """If this fails, the stand-in for numpy.dtype can be simplified."""
    dtype = np.dtype('f8', False, True)
    fields = {'a': (np.dtype('i8'), 0)}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dtype.__setstate__((3, '|', None, ('a',), fields, 8, 8, 63))
    assert dtype.hasobject


def test_runner_refuses_malicious_checkpoint(tmp_path):
    from mmengine.runner.checkpoint import CheckpointLoader

    path = tmp_path / 'evil.pth'
    torch.save(attack_system(tmp_path), path)
    # what Runner.load_checkpoint and Runner.resume call
    with pytest.raises(UsageError, match='refused because it holds'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('share', [0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
def test_truncated_checkpoint(tmp_path, share, legacy):
    path = tmp_path / 'cut.pth'
    save_pickle({'state_dict': {'w': torch.zeros(1000)}}, path, legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UsageError, match='cut.pth is truncated or not a'):
        compat.load_checkpoint(path)


@pytest.mark.parametrize('content', [b'hello world', b'\x80\x02', b'PK\x03'])
def test_no_checkpoint_at_all(tmp_path, content):
    path = tmp_path / 'text.pth'
    path.write_bytes(content)
    with pytest.raises(UsageError, match='truncated or not a checkpoint'):
        compat.load_checkpoint(path)


def test_missing_checkpoint_and_directory(tmp_path):
    with pytest.raises(UsageError, match='none.pth does not exist'):
        compat.load_checkpoint(tmp_path / 'none.pth')
    with pytest.raises(UsageError, match='is not a file'):
        compat.load_checkpoint(tmp_path)


def test_environment_is_made_safe(monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD')
    compat.enable_safe_checkpoints()
    assert os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] == '1'
    assert 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD' not in os.environ


def test_safe_checkpoints_still_needed(tmp_path):
    """Plain MMEngine cannot read its own checkpoint, or reads it unsafely.

    Ours it can read.
    """
    torch.save(history(), tmp_path / 'ours.pth')
    done = in_children(
        tmp_path,
        'import torch\nfrom mmengine.logging import HistoryBuffer',
        {
            'theirs': (
                'from mmengine.runner.checkpoint import CheckpointLoader\n'
                'class Evil:\n'
                '    def __reduce__(self): return (open, ("ran", "w"))\n'
                'torch.save({"h": HistoryBuffer([1.], [1])}, "a.pth")\n'
                'torch.save(Evil(), "evil.pth")\n'
                'for name in ("a.pth", "evil.pth"):\n'
                '    try:\n'
                '        CheckpointLoader.load_checkpoint(name, "cpu")\n'
                '        print("loaded")\n'
                '    except Exception as error: print("refused")\n'
            ),
            'ours': (
                'b = torch.load("../ours.pth", weights_only=False)\n'
                'print(b.statistics("max"))\n'
            ),
        },
    )
    theirs = done['theirs'].stdout
    needed = theirs.split()[-2:] != ['loaded', 'refused']
    assert needed or 'loaded' not in theirs, (
        'remove compat.enable_safe_checkpoints'
    )
    assert done['ours'].stdout.strip() == '2.0', done['ours'].stderr


# --- warnings --------------------------------------------------------------


def test_neighbours_are_silent_and_warn_without_compat(run_python):
    code = 'import mmcv.cnn.bricks.transformer, pkg_resources'
    loud = run_python('-c', code)
    assert 'Fail to import' in loud.stderr, 'shorten silence_neighbours'
    # as a warning that is shown by default only since setuptools 80.9
    if Version(version('setuptools')) >= Version('80.9'):
        assert 'pkg_resources is dep' in loud.stderr, 'shorten it'
    quiet = run_python(
        '-c',
        f'from mmauxq import compat; compat.silence_neighbours(); {code}',
    )
    assert quiet.returncode == 0
    assert quiet.stderr == ''


# --- weight decay ----------------------------------------------------------


def test_default_optim_constructor_replaces_and_is_needed(run_python):
    done = run_python(
        '-c',
        'from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as r\n'
        'import mmengine.optim\n'
        'name = "DefaultOptimWrapperConstructor"\n'
        'print(hasattr(r.get(name), "_knows_decay"))\n'
        'from mmauxq import compat\n'
        'compat.default_optim_constructor()\n'
        'compat.default_optim_constructor()\n'
        'import mmpretrain.registry as m\n'
        'print(m.OPTIM_WRAPPER_CONSTRUCTORS.get(name).__name__)',
    )
    before, after = done.stdout.split()
    assert before == 'False'
    assert after == 'QuantizerAwareOptimWrapperConstructor'
