"""The options of ``model.speed``, and which step they give."""

import copy
import io

import pytest
import torch
from mmengine.config import ConfigDict

from mmauxq.accelerate import AcceleratedStep, Speed
from mmauxq.errors import UsageError
from tests.networks import batch, classifier, joint_qat
from tests.support.children import in_children


def refused(speed, **settings):
    """The one line that it ends with."""
    with pytest.raises(UsageError) as error:
        joint_qat(speed=speed, **settings)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('config', [None, 'auto', {}])
def test_the_defaults(config):
    speed = Speed.from_config(config)
    assert speed == Speed(
        compile=None, cuda_graph=None, memory=None, channels_last=None
    )
    assert speed.auto


@pytest.mark.parametrize(
    'options, auto',
    [
        (dict(memory='codes'), True),
        (dict(compile=False), True),
        (dict(compile=True), False),
        (dict(cuda_graph=False), False),
        (dict(cuda_graph=True), False),
    ],
)
def test_whether_the_form_was_chosen(options, auto):
    assert Speed(**options).auto is auto


@pytest.mark.parametrize('gpu', [False, True])
def test_a_gpu_records_without_being_asked(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    step = joint_qat(speed=dict(memory='codes', channels_last=False)).step
    assert (step.recorded is not None) is gpu
    step = joint_qat(speed=dict(cuda_graph=False, channels_last=False)).step
    assert step.recorded is None


def test_a_dict_sets_options():
    config = ConfigDict(
        compile=dict(mode='default'), memory='codes', channels_last=False
    )
    speed = Speed.from_config(config)
    assert speed.compile == dict(mode='default')
    assert (speed.memory, speed.channels_last) == ('codes', False)
    assert not speed.cuda_graph


def test_the_scope_of_a_config_is_no_option():
    assert Speed.from_config(dict(_scope_='mmauxq')) == Speed()


@pytest.mark.parametrize(
    'speed, message',
    [
        (
            'fast',
            "model.speed: expected 'auto', 'eager' or a dict, got 'fast'",
        ),
        (True, "model.speed: expected 'auto', 'eager' or a dict, got True"),
        (
            dict(cuda_graphs=True),
            'model.speed: expected one of compile, cuda_graph, memory, '
            "channels_last, got 'cuda_graphs'; did you mean cuda_graph?",
        ),
        (
            dict(auto=True),
            'model.speed: expected one of compile, cuda_graph, memory, '
            "channels_last, got 'auto'",
        ),
        (
            dict(cuda_graph='yes'),
            "model.speed.cuda_graph: expected True, False or None, got 'yes'",
        ),
        (
            dict(channels_last='yes'),
            'model.speed.channels_last: expected True, False or None, got '
            "'yes'",
        ),
        (
            dict(memory='less'),
            "model.speed.memory: expected one of ['codes', 'recompute'] or "
            "None, got 'less'",
        ),
        (
            dict(cuda_graph=True, compile=True),
            'model.speed: expected cuda_graph or compile, got both; '
            "compile=dict(mode='reduce-overhead') compiles and records",
        ),
        (
            dict(compile='fast'),
            'model.speed.compile: expected True, False or arguments of '
            "torch.compile, got 'fast'",
        ),
    ],
)
def test_wrong_options_are_one_line(speed, message):
    assert refused(speed) == message


def test_unknown_options_of_the_compiler():
    message = refused(dict(compile=dict(mode='fast')))
    assert message.startswith(
        'model.speed.compile: expected arguments of torch.compile, got '
        "{'mode': 'fast'}: "
    )
    message = refused(dict(compile=dict(modus='default')))
    assert "{'modus': 'default'}: " in message


@pytest.mark.parametrize(
    'option, without',
    [(dict(compile=True), 'None'), (dict(cuda_graph=True), 'False')],
)
def test_a_head_with_a_loss_of_its_own_is_eager(option, without):
    config = classifier()
    config['head'] = dict(
        type='ArcFaceClsHead', num_classes=10, in_channels=16
    )
    (name,) = option
    assert refused(option, architecture=config, guidance=None) == (
        f'model.speed.{name}: expected a head whose loss is computed from '
        'logits alone, got a ArcFaceClsHead in a ImageClassifier; set it to '
        f'{without}'
    )


@pytest.mark.parametrize(
    'gpu, speed, expected',
    [
        (False, None, type(None)),
        (False, 'auto', type(None)),
        (False, 'eager', type(None)),
        (False, {}, AcceleratedStep),
        (False, dict(memory='codes'), AcceleratedStep),
        (True, 'eager', type(None)),
        (True, None, AcceleratedStep),
        (True, 'auto', AcceleratedStep),
        (True, {}, AcceleratedStep),
    ],
)
def test_which_step_runs(gpu, speed, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    assert type(joint_qat(speed=speed).step) is expected


@pytest.mark.parametrize('gpu', [False, True])
@pytest.mark.parametrize('option', [None, False, True])
def test_channels_last_where_there_is_a_gpu(option, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    model = joint_qat(
        speed=dict(channels_last=option),
        architecture=classifier(base_channels=8),
    )
    expected = gpu if option is None else option
    assert model.step.channels_last is expected
    conv = model.architecture.backbone.layer1[0].conv2
    assert expected == conv.weight.is_contiguous(
        memory_format=torch.channels_last
    )
    # an image of one channel has the strides of both layouts
    found = model.step._laid_out(torch.randn(2, 3, 8, 8))
    assert expected == found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('make', ['copy', 'file'])
@pytest.mark.parametrize(
    'speed',
    [
        'eager',
        {},
        dict(memory='codes'),
        dict(compile=dict(backend='eager')),
    ],
)
def test_a_whole_model_is_copied_or_stored(speed, make, monkeypatch):
    """Compiled code and recordings stay with the model that they are of."""
    # set by the commands, for the whole process
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)
    model = joint_qat(speed=speed)
    for _ in range(2):
        model.loss(*batch())
    if make == 'copy':
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other.step) is type(model.step)
    assert other.step is None or other.step.model is other
    expected, found = model.loss(*batch()), other.loss(*batch())
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss)
    # each trains its own weights
    sum(other.loss(*batch()).values()).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in other.parameters())
    assert getattr(other.step, 'compiled', None) is None or (
        other.step.compiled is not model.step.compiled
    )


def test_the_form_of_the_kernels_must_exist(tmp_path, monkeypatch):
    """Also where no kernel would run."""
    monkeypatch.setenv('MMAUXQ_OPS', 'garbage')
    speeds = dict(left_out=None, eager='eager', auto={})
    found = in_children(
        tmp_path,
        'from tests.networks import *',
        {n: f'joint_qat(speed={speed!r})' for n, speed in speeds.items()},
    )
    for name, done in found.items():
        assert done.returncode != 0, name
        assert done.stderr.rstrip().endswith(
            'UsageError: MMAUXQ_OPS: expected one of auto, reference, kernel, '
            "got 'garbage'"
        ), name
