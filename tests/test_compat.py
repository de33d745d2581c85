"""Work-arounds: that they work, and that they are still needed."""

import importlib.util
import os
import pickle
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import OptimWrapper
from mmengine.runner import checkpoint as mmengine_checkpoint
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


# --- checkpoints -----------------------------------------------------------


class Call:
    """Pickles as a call of ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.value = (function, arguments)

    def __reduce__(self):
        return self.value


@pytest.fixture
def evil(tmp_path):
    path = tmp_path / 'evil.pth'
    torch.save(Call(os.system, f'touch {tmp_path / "ran"}'), path)
    yield str(path)
    assert not (tmp_path / 'ran').exists()


def test_the_attack_would_work_without_protection(tmp_path):
    """The marker file is a fair witness."""
    call = Call(os.system, f'touch {tmp_path / "ran"}')
    pickle.loads(pickle.dumps(call))
    assert (tmp_path / 'ran').exists()


def test_loaders_of_mmengine_refuse(evil):
    for read in (
        lambda: mmengine_checkpoint.load_checkpoint(
            torch.nn.Linear(1, 1), evil
        ),
        lambda: mmengine_checkpoint.CheckpointLoader.load_checkpoint(evil),
    ):
        with pytest.raises(UsageError, match=r'evil.pth is refused .*system'):
            read()
    # every other loader of the process, also one that asks for trouble
    with pytest.raises(pickle.UnpicklingError):
        torch.load(evil, weights_only=False)


SCHEMES = ['https://x.org/a/b.pth', 'torchvision://resnet18', 'mmcls://vgg11']


@pytest.mark.parametrize('name', SCHEMES)
def test_addresses_come_through_the_gate(tmp_path, monkeypatch, evil, name):
    fetched = []

    def download(url: str, target: str) -> None:
        fetched.append(url)
        shutil.copy(evil, target)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setattr(
        mmengine_checkpoint,
        'get_torchvision_models',
        lambda: {'resnet18': 'https://x.org/resnet18.pth'},
    )
    for _ in range(2):
        with pytest.raises(
            UsageError, match=r'hub/checkpoints/.*\.pth is ref'
        ):
            mmengine_checkpoint.CheckpointLoader.load_checkpoint(name)
    assert len(fetched) == 1 and fetched[0].startswith('https://')


@pytest.mark.parametrize('name', ['s3://a/b.pth', 'pavi://a', 'x:s3://a.pth'])
def test_other_stores_are_refused(name):
    with pytest.raises(UsageError, match=f'{name}: expected a file or the'):
        mmengine_checkpoint.CheckpointLoader.load_checkpoint(name)
    with pytest.raises(UsageError, match='x.org/: expected a file or the'):
        mmengine_checkpoint.CheckpointLoader.load_checkpoint('http://x.org/')


def test_environment_is_made_safe(monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD')
    compat.enable_safe_checkpoints()
    assert os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] == '1'
    assert 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD' not in os.environ


def test_safe_checkpoints_still_needed(tmp_path):
    """Plain MMEngine runs a config that a checkpoint holds, and cannot read
    its own checkpoints, or reads them unsafely."""
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
            'config': (
                'import inspect\nfrom mmengine.runner import Runner\n'
                'print("fromstring" in inspect.getsource(Runner.resume))\n'
            ),
        },
    )
    theirs = done['theirs'].stdout
    needed = theirs.split()[-2:] != ['loaded', 'refused']
    needed |= done['config'].stdout.strip() == 'True'
    assert needed or 'loaded' not in theirs, (
        'remove compat.enable_safe_checkpoints'
    )


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


# --- losses ----------------------------------------------------------------


def test_losses_wait_until_they_are_read(monkeypatch):
    """In their order; and what is read is what MMEngine would have kept."""
    compat.read_losses_when_asked()
    monkeypatch.setattr(compat, '_is_on_gpu', torch.is_tensor)
    hub = MessageHub('waiting')
    asked = []
    monkeypatch.setattr(
        torch,
        'stack',
        lambda x, stack=torch.stack: asked.append(1) or stack(x),
    )
    for step in range(3):
        hub.update_scalar('lr', 0.5**step)
        hub.update_scalars(dict(a=torch.tensor(step / 4), b=torch.tensor([3])))
    assert hub.get_scalar('lr').data[0].tolist() == [1, 0.5, 0.25]
    with pytest.raises(KeyError, match='c is not found'):
        hub.get_scalar('c')
    hub.update_scalar('a', torch.tensor(0.75))
    assert len(asked) == 1  # a key that is not there may wait as well
    hub.update_scalar('a', 7.0)  # after those that wait
    assert len(asked) == 2
    hub.update_scalar('a', torch.tensor(8.0), count=2)
    values, counts = hub.get_scalar('a').data
    assert values.tolist() == [0, 0.25, 0.5, 0.75, 7, 8]
    assert counts.tolist() == [1, 1, 1, 1, 1, 2]
    hub.update_scalar('b', torch.tensor(5), resumed=True)
    saved = hub.state_dict()['log_scalars']
    assert saved['b'].data[0].tolist() == [3, 3, 3, 5]
    assert saved['lr'].data[0].tolist() == [1, 0.5, 0.25]
    del asked[:]
    for step in range(250):
        hub.update_scalar('c', torch.tensor(float(step)))
    assert len(asked) == 2  # not all of an epoch is kept
    assert hub.get_scalar('c').data[0].tolist() == list(range(250))


def test_norms_of_clipped_gradients_wait_too(monkeypatch):
    compat.read_losses_when_asked()
    monkeypatch.setattr(compat, '_is_on_gpu', torch.is_tensor)
    weight = torch.nn.Parameter(torch.zeros(2))
    wrapper = OptimWrapper(
        torch.optim.SGD([weight], 1.0), clip_grad=dict(max_norm=1.0)
    )
    hub = wrapper.message_hub = MessageHub('clipping')
    monkeypatch.setattr(torch.Tensor, '__float__', None)
    wrapper.update_params(weight @ torch.tensor([3.0, 4.0]))
    assert hub.get_scalar('train/grad_norm').data[0] == pytest.approx([5.0])
    assert weight.tolist() == pytest.approx([-0.6, -0.8])
    by_value = OptimWrapper(
        torch.optim.SGD([weight], 1.0),
        clip_grad=dict(type='value', clip_value=1),
    )
    by_value.message_hub = MessageHub('by value')
    by_value.update_params(weight @ torch.tensor([3.0, 4.0]))
    assert weight.tolist() == pytest.approx([-1.6, -1.8])
    assert not by_value.message_hub.log_scalars


def test_mmengine_asks_for_each_loss(run_python):
    """If this fails, compat.read_losses_when_asked can go."""
    code = (
        'import torch\n'
        'from mmengine.logging import MessageHub\n'
        'class Loss(torch.Tensor):\n'
        '    def item(self): print("asked"); return 1.0\n'
        'hub = MessageHub("a")\n'
        'hub.update_scalar("loss", torch.zeros(()).as_subclass(Loss))\n'
        'import inspect\n'
        'from mmengine.optim import OptimWrapper\n'
        'print("float(grad)" in inspect.getsource(OptimWrapper._clip_grad))\n'
    )
    assert run_python('-c', code).stdout == 'asked\nTrue\n'


def copying_buffer():
    """MMEngine's class as it is, from a module of its own."""
    spec = importlib.util.find_spec('mmengine.logging.history_buffer')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HistoryBuffer


@pytest.mark.parametrize(
    'given', [([], []), ([1, 2], [1, 1]), ([True], [1]), ([0.5] * 9, [3] * 9)]
)
def test_a_history_that_grows_in_place_is_that_of_mmengine(given):
    compat.append_to_histories_in_place()
    ours = HistoryBuffer(*given, max_length=1500)
    theirs = copying_buffer()(*given, max_length=1500)
    held = []
    for i in range(4000):
        value = (i % 7, i / 3, float('nan'), True)[i % 4 if i > 5 else 0]
        for buffer in (ours, theirs):
            buffer.update(value, i % 3)
        if i in (3, 1023, 1700):
            held.append((ours.data[0], ours.data[0].copy()))
        if i == 2000:  # as resuming replaces it
            ours = pickle.loads(pickle.dumps(ours))
    for one, other in zip(ours.data, theirs.data, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other, equal_nan=True)
    for view, then in held:  # what was read does not change
        assert np.array_equal(view, then, equal_nan=True)
    assert ours.mean(10) == pytest.approx(theirs.mean(10), nan_ok=True)
    with pytest.raises(TypeError, match='log_val must be int or float'):
        ours.update('1')


def test_a_history_is_hardly_ever_copied():
    compat.append_to_histories_in_place()
    buffer = HistoryBuffer()
    places = set()
    for i in range(20_000):
        buffer.update(i)
        places.add(buffer.data[0].__array_interface__['data'][0])
    assert len(places) <= 6  # 1,024 values, and twice as many each time
    assert buffer.data[0].tolist() == list(range(20_000))
    # what is saved has no space behind it
    assert len(pickle.dumps(buffer)) < 2 * 20_000 * 8 + 1000


def test_mmengine_copies_a_history_for_each_value():
    """If this fails, compat.append_to_histories_in_place can go."""
    buffer = copying_buffer()()
    held = []
    for i in range(20):
        buffer.update(i)
        held.append(buffer.data[0])
    assert not any(map(np.shares_memory, held, held[1:]))


# --- weight decay ----------------------------------------------------------


def test_scales_are_spared_and_mmengine_would_not(run_python):
    done = run_python(
        '-c',
        'import torch\n'
        'from mmengine.runner import runner\n'
        'model = torch.nn.Linear(2, 2)\n'
        'model.input_quantizer = torch.nn.Linear(1, 1)\n'
        'cfg = dict(optimizer=dict(type="SGD", lr=1.0, weight_decay=1.0))\n'
        'def groups():\n'
        '    wrapper = runner.build_optim_wrapper(model, cfg)\n'
        '    return [g["weight_decay"] for g in wrapper.param_groups]\n'
        'print(groups())\n'
        'from mmauxq import compat\n'
        'compat.spare_scales_from_decay()\n'
        'once = runner.build_optim_wrapper\n'
        'compat.spare_scales_from_decay()\n'
        'assert runner.build_optim_wrapper is once\n'
        'print(groups())',
    )
    assert done.stdout.splitlines() == ['[1.0]', '[1.0, 0.0]']
