"""bfloat16 where the GPU computes it natively, float32 elsewhere."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import AmpOptimWrapper, OptimWrapper, build_optim_wrapper
from torch import nn

from mmauxq.engine.optimizers import AutoAmpOptimWrapper, CPUAmpOptimWrapper
from tests.networks import batch, captured, joint_qat

# It asks for the GPU when it is made, so before a GPU is feigned.
MMLogger.get_current_instance()
IN_BFLOAT16 = (
    'Precision: bfloat16 under autocast; --no-amp, or '
    'optim_wrapper.type=OptimWrapper, gives float32'
)
IN_FLOAT32 = 'Precision: float32, as no GPU here computes bfloat16 natively'


def feign(monkeypatch, gpu: bool, native: bool) -> None:
    """A machine with or without a GPU, which emulates bfloat16 at least."""

    def is_bf16_supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', is_bf16_supported)


def network(device='cpu') -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(
        device
    )


def sgd(model, **settings) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), 0.1, 0.9, **settings)


@pytest.mark.parametrize(
    'gpu, native, in_bfloat16',
    [
        (True, True, True),
        (True, False, False),
        (False, False, False),
        (False, True, False),  # a build for AMD's GPUs
    ],
)
def test_the_choice(monkeypatch, gpu, native, in_bfloat16):
    feign(monkeypatch, gpu, native)
    model = network()
    with captured() as messages:
        wrapper = AutoAmpOptimWrapper(optimizer=sgd(model))
    assert messages == [IN_BFLOAT16 if in_bfloat16 else IN_FLOAT32]
    with wrapper.optim_context(model):
        assert torch.is_autocast_enabled('cuda') is in_bfloat16
        assert torch.get_autocast_dtype('cuda') == (
            torch.bfloat16 if in_bfloat16 else torch.float16
        )
    assert not torch.is_autocast_enabled('cuda')


def trained(kind, **settings) -> tuple[torch.dtype, dict, dict]:
    """Of logits; weights and state of the optimizer after some steps."""
    model = network()
    wrapper = kind(optimizer=sgd(model), **settings)
    wrapper.initialize_count_status(model, 0, 8)
    for _ in range(8):
        with wrapper.optim_context(model):
            logits = model(torch.rand(5, 3))
            loss = logits.square().mean()
        wrapper.update_params(loss)
    return logits.dtype, model.state_dict(), wrapper.optimizer.state_dict()


@pytest.mark.parametrize(
    'settings',
    [{}, dict(clip_grad=dict(max_norm=0.1)), dict(accumulative_counts=3)],
)
def test_each_precision_is_that_of_another_wrapper_to_the_bit(
    monkeypatch, settings
):
    plain = trained(OptimWrapper, **settings)
    amp = trained(CPUAmpOptimWrapper, dtype='bfloat16', **settings)
    assert (plain[0], amp[0]) == (torch.float32, torch.bfloat16)
    feign(monkeypatch, False, False)
    same(trained(AutoAmpOptimWrapper, **settings), plain)
    feign(monkeypatch, True, True)
    autocast = torch.autocast  # of the CPU in the place of the GPU
    monkeypatch.setattr(
        torch, 'autocast', lambda device, dtype: autocast('cpu', dtype=dtype)
    )
    same(trained(AutoAmpOptimWrapper, **settings), amp)


def same(found, expected):
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1:], expected[1:], rtol=0, atol=0)


def test_a_schedule_for_imagenet_takes_it():
    """As a config that inherits them is read and built by MMEngine."""
    schedule = 'mmauxq::_base_/schedules/imagenet_w2a2.py'
    cfg = Config.fromstring(f'_base_ = {schedule!r}', '.py')
    model = network()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(wrapper) is AutoAmpOptimWrapper
    assert wrapper.optimizer.defaults['weight_decay'] == 2.5e-5


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('native', [False, True])
def test_the_state_of_another_precision_is_taken(monkeypatch, scaled, native):
    """And given: float16 has the scale of its losses beside it."""

    def other(model, **settings):
        if scaled:
            return CPUAmpOptimWrapper(
                optimizer=sgd(model), dtype='float16', loss_scale=settings
            )
        return OptimWrapper(sgd(model))

    model = network()
    before = other(model, init_scale=8.0)
    before.update_params(model(torch.ones(1, 3)).sum())
    feign(monkeypatch, native, native)
    auto = AutoAmpOptimWrapper(optimizer=sgd(model))
    auto.load_state_dict(copy.deepcopy(before.state_dict()))
    state = auto.state_dict()
    assert list(state) == ['state', 'param_groups']
    momenta = [entry['momentum_buffer'] for entry in state['state'].values()]
    assert len(momenta) == 4 and any(m.any() for m in momenta)

    after = other(model, init_scale=4.0)
    after.load_state_dict(copy.deepcopy(state))
    theirs = after.state_dict()
    if scaled:
        assert theirs.pop('loss_scaler')['scale'] == 4.0  # as it begins
    torch.testing.assert_close(theirs, state, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_a_recorded_step_is_that_of_mmengines_wrapper_to_the_bit():
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip('needs a GPU that computes bfloat16 natively')
    inputs, samples = batch(16)
    data = dict(inputs=list(inputs), data_samples=samples)
    amp = dict(dtype='bfloat16', loss_scale=dict(enabled=False))
    found = []
    for kind, settings in ((AmpOptimWrapper, amp), (AutoAmpOptimWrapper, {})):
        model = joint_qat().cuda()
        wrapper = kind(optimizer=sgd(model, fused=True), **settings)
        with torch.backends.cudnn.flags(deterministic=True):
            losses = [
                {k: v.item() for k, v in step.items()}
                for step in (model.train_step(data, wrapper) for _ in range(8))
            ]
        recording = model.step.recorded.recording
        assert recording.replays >= 4 and torch.bfloat16 in recording.kind
        found.append((losses, model.state_dict()))
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        assert torch.equal(found[1][1][name], value), name
