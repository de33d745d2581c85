import math

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import nn

from mmauxq.engine.hooks import OscillationFreezing
from mmauxq.engine.hooks.oscillation_freezing_hook import STATE
from mmauxq.engine.resume import resume
from mmauxq.errors import UsageError
from mmauxq.layers import QuantLinear
from mmauxq.quantizers import LSQ, LSQPlus
from mmauxq.registry import HOOKS
from tests.engine.hooks.test_transition_rate_hook import scalars
from tests.engine.hooks.test_transition_rate_schedule_hook import (
    Counting,
    backward,
    network,
)
from tests.networks import QUANTIZERS, batch, joint_qat
from tests.running import make_runner, state
from tests.support.ranks import on_ranks

HOOK = dict(type='mmauxq.OscillationFreezingHook')
OFTEN = dict(HOOK, start=0.3, end=0.1, momentum=0.5)
"""With which a run of a few steps has frozen weights."""


def settings(**changes) -> dict:
    return {**dict(start=0.1, end=0.01, momentum=0.9), **changes}


def quantized(rows, quantizer) -> QuantLinear:
    """A linear layer of these weights, whose scale is 1."""
    weight = torch.tensor(rows)
    layer = QuantLinear.from_float(
        nn.Linear(*weight.shape[::-1], bias=False),
        quantizer,
        LSQ(8, 'activation'),
    )
    layer.weight_quantizer.calibrate(weight)
    nn.init.ones_(layer.weight_quantizer.step)
    layer.weight.data = weight
    return layer


# --- the formula -------------------------------------------------------------


def test_by_hand():
    """Momentum 1/2, threshold 0.7. Weights are moved to the rows; the first
    turns back in each step, the second does so with other codes, the third
    stands still between its changes, the fourth goes on as it went."""
    layer = quantized([[0.1, 0.2, 0.0, 0.0]], LSQ(3, 'weight')).double()
    weight = layer.weight
    optimizer = torch.optim.SGD([weight], lr=1.0)
    freezing = OscillationFreezing(
        layer, optimizer, **settings(start=0.7, end=0.7, momentum=0.5)
    )

    def move(*to):
        target = torch.tensor([to], dtype=torch.float64)
        weight.grad = weight.detach() - target
        optimizer.step()

    def seen():
        return [
            x.tolist()
            for x in (freezing.frequencies, freezing.means, freezing.frozen)
        ]

    no, yes = False, True
    move(0.9, 2.2, 1.4, -1.0)  # codes 1, 2, 1, -1
    assert seen() == [[0, 0, 0, 0], [0.5, 1, 0.5, -0.5], [no] * 4]
    assert freezing.directions.tolist() == [1, 1, 1, -1]
    move(0.4, 0.3, 0.9, 0.2)  # 0, 0, 1, 0
    assert seen() == [
        [0.5, 0.5, 0, 0.5], [0.25, 0.5, 0.75, -0.25], [no] * 4,
    ]  # fmt: skip
    assert freezing.directions.tolist() == [-1, -1, 1, 1]
    move(0.6, 9.0, 0.3, 0.1)  # 1, 3, 0, 0: two are frozen, at 0.625 and 1.75
    assert seen() == [
        [0.75, 0.75, 0.5, 0.25], [1, 2, 0.375, -0.125], [yes, yes, no, no],
    ]  # fmt: skip
    assert weight[0].tolist() == pytest.approx([1, 2, 0.3, 0.1])
    with torch.no_grad():
        layer.weight_quantizer.step.fill_(2.0)
    move(-7.0, -7.0, 0.2, 3.2)  # 1, 2, 0, 2 in steps of 2
    assert seen() == [
        [0.375, 0.375, 0.25, 0.125],
        [1, 2, 0.1875, 0.9375],
        [yes, yes, no, no],
    ]
    assert freezing.directions.tolist()[2:] == [-1, 1]
    assert weight[0].tolist() == pytest.approx([2, 4, 0.2, 3.2])


def test_weights_for_which_it_is_told():
    """Above the last threshold, and not frozen."""
    layer = quantized([[0.0, 0.0, 0.0]], LSQ(2, 'weight'))
    optimizer = torch.optim.SGD([layer.weight], lr=1.0)
    freezing = OscillationFreezing(layer, optimizer, **settings(end=0.05))
    freezing.frequencies.copy_(torch.tensor([0.05, 0.06, 0.2]))
    freezing.frozen[2] = True
    assert freezing.oscillating.tolist() == [False, True, False]


@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('kind', [LSQ, LSQPlus])
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_a_frozen_code_stays_while_the_scale_moves(bits, kind, per_channel):
    """All codes, those at the ends among them, at scales of any size."""
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).float()
    quantizer = kind(bits, 'weight', num_channels=3 if per_channel else None)
    layer = quantized(codes.repeat(3, 2).tolist(), quantizer)
    optimizer = torch.optim.SGD(
        [layer.weight, quantizer.step], lr=0.5, momentum=0.9, weight_decay=0.1
    )
    freezing = OscillationFreezing(layer, optimizer, **settings())
    torch.manual_seed(0)
    expected = quantizer.codes(layer.weight)
    frozen = torch.zeros(3, 2 * len(codes), dtype=torch.bool)
    frozen[:, : len(codes)] = True
    freezing.frozen.copy_(frozen.flatten())
    freezing.means.copy_(codes.repeat(3, 2).flatten())
    freezing.started = True
    for exponent in range(-8, 4):
        with torch.no_grad():
            step = 10.0**exponent * (0.5 + torch.rand(quantizer.step.shape))
            quantizer.step.copy_(step)
        layer.weight.grad = torch.randn_like(layer.weight)
        quantizer.step.grad = torch.randn_like(quantizer.step) * step / 4
        optimizer.step()
        found = quantizer.codes(layer.weight)
        assert torch.equal(found[frozen], expected[frozen])
        value = quantizer(layer.weight)
        assert torch.equal(layer.weight[frozen], value[frozen])
        assert not torch.equal(layer.weight[~frozen], value[~frozen])
        assert torch.equal(freezing.codes, found.flatten().float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
@pytest.mark.filterwarnings('ignore:Synchronization debug mode')
def test_a_step_asks_the_gpu_for_nothing():
    net = network().float().cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    freezing = OscillationFreezing(net, optimizer, **settings(start=0.3))
    for t in range(20):
        torch.manual_seed(t)
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        torch.cuda.set_sync_debug_mode('error' if t else 'default')
        optimizer.step()
        torch.cuda.set_sync_debug_mode('default')
    assert 0 < freezing.frozen.sum() < len(freezing.frozen)


def test_the_threshold_is_a_cosine():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    freezing = OscillationFreezing(net, optimizer, **settings())
    found = []
    for progress in (0, 0.25, 0.5, 1):
        freezing.progress = progress
        found.append(freezing.threshold)
    quarter = 0.055 + 0.045 * math.sqrt(0.5)
    assert found == pytest.approx([0.1, quarter, 0.055, 0.01])


def test_a_step_within_a_step_is_one():
    """An optimizer that calls the step of its base."""
    found = []
    for kind in (torch.optim.SGD, Counting):
        net = network()
        optimizer = kind(net.parameters(), lr=1.0)
        freezing = OscillationFreezing(net, optimizer, **settings(start=0.3))
        for t in range(20):
            backward(net, t)
            optimizer.step()
        found.append((freezing.frequencies, freezing.frozen, net[0].weight))
    (frequencies, frozen, _), _ = found
    assert frequencies.any() and 0 < frozen.sum() < len(frozen)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- in a run ----------------------------------------------------------------


def freezing_of(runner) -> OscillationFreezing:
    (hook,) = (h for h in runner.hooks if hasattr(h, 'freezing'))
    return hook.freezing


def settings_of_run(**changes) -> dict:
    arguments = dict(
        custom_hooks=[OFTEN],
        train_cfg=dict(type='mmauxq.EpochLoop', max_epochs=3),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.3, momentum=0.9)),
    )
    return {**arguments, **changes}


@pytest.mark.parametrize('amp', [False, True], ids=['float32', 'bfloat16'])
def test_both_parts_are_in_the_log(tmp_path, amp):
    arguments = settings_of_run()
    if amp:
        arguments['optim_wrapper'].update(
            type='mmauxq.CPUAmpOptimWrapper', dtype='bfloat16'
        )
    runner = make_runner(tmp_path, **arguments)
    runner.train()
    freezing, lines = freezing_of(runner), scalars(tmp_path)
    part = freezing.frozen.double().mean().item()
    assert lines[-1]['frozen'] == pytest.approx(part) and 0 < part < 1
    assert lines[-1]['oscillating'] == pytest.approx(
        freezing.oscillating.double().mean().item()
    )
    assert lines[0]['frozen'] == lines[0]['oscillating'] == 0
    parts = [line['frozen'] for line in lines]
    assert parts == sorted(parts)
    assert freezing.progress == pytest.approx(11 / 12)
    codes = torch.cat(
        [q.codes(w).flatten() for w, q in freezing.layers.values()]
    )
    assert torch.equal(codes[freezing.frozen], freezing.means[freezing.frozen])


def test_a_resumed_run_goes_on_as_the_whole(tmp_path):
    twice = settings_of_run(
        param_scheduler=dict(type='CosineAnnealingLR', T_max=3)
    )
    whole = make_runner(tmp_path / 'whole', **twice)
    whole.train()
    resumed = make_runner(tmp_path / 'resumed', **twice)
    checkpoint = str(tmp_path / 'whole/epoch_1.pth')
    resumed._resume, resumed._load_from = True, checkpoint
    resumed.load_or_resume = lambda: resume(resumed, checkpoint)
    resumed.train()
    assert resumed.iter == 12
    kept = [freezing_of(x).state_dict() for x in (whole, resumed)]
    assert kept[0]['frozen'].any()
    for name, value in kept[0].items():
        assert torch.equal(value, kept[1][name]), name
    for key, value in state(whole.model).items():
        assert torch.equal(value, state(resumed.model)[key]), key


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
def test_ranks_freeze_the_same_weights():
    (first, model), (second, other) = on_ranks(2, _frozen_on_half)
    assert 0 < first['frozen'].sum() < len(first['frozen'])
    for a, b in ((first, second), (model, other)):
        assert a.keys() == b.keys()
        assert all((a[name] == b[name]).all() for name in a)


def _frozen_on_half(rank):
    model = joint_qat(seed=rank)  # DDP makes the weights equal
    wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    freezing = OscillationFreezing(
        model, optimizer, start=0.3, end=0.1, momentum=0.5
    )
    part, optim = slice(8 * rank, 8 * rank + 8), OptimWrapper(optimizer)
    for step in range(8):
        inputs, samples = batch(16, seed=step % 4)
        data = dict(inputs=list(inputs[part]), data_samples=samples[part])
        wrapped.train_step(data, optim)
    parameters = model.named_parameters()
    return [
        {name: t.detach().numpy().copy() for name, t in tensors}
        for tensors in (freezing.state_dict().items(), parameters)
    ]


def test_iterations_without_a_step_do_not_count(tmp_path):
    arguments = settings_of_run()
    arguments['optim_wrapper']['accumulative_counts'] = 5
    runner = make_runner(tmp_path, **arguments)
    runner.train()
    first, second = (
        torch.load(tmp_path / f'epoch_{n}.pth', weights_only=True)[STATE]
        for n in (1, 2)
    )
    assert first == {} and second['directions'].any()
    # one step cannot turn a code back
    assert not second['frequencies'].any()
    freezing_of(runner).load_state_dict(first, 'a.pth')
    assert freezing_of(runner).state_dict().keys() == second.keys()


def test_the_state_of_another_network_is_refused():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    freezing = OscillationFreezing(net, optimizer, **settings())
    assert freezing.state_dict() == {}
    backward(net, 0)
    optimizer.step()
    kept = freezing.state_dict()
    freezing.load_state_dict(kept, 'a.pth')
    assert sum(x.element_size() for x in kept.values()) == 8 + 8 + 1 + 1
    without = {k: v for k, v in kept.items() if k != 'frozen'}
    for value, expected in [
        (without, r'frozen: expected a tensor of shape \(288,\)'),
        (dict(kept, means=torch.ones(3)), r'means: expected a tensor of shap'),
        (dict(kept, means=kept['means'] * math.nan), 'expected finite number'),
        (3, 'expected a dict, got 3'),
    ]:
        with pytest.raises(
            UsageError, match=f'checkpoint a.pth: {STATE}.*{expected}'
        ):
            freezing.load_state_dict(value, 'a.pth')


# --- what is refused ---------------------------------------------------------


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(start=0), 'start: expected a number above 0, up to 1, got 0'),
        (dict(start=1.1), 'start: expected a number above 0, up to 1, got 1'),
        (dict(start='0.1'), "start: expected .*, got '0.1'"),
        (dict(start=math.nan), 'start: expected .*, got nan'),
        (dict(end=0), 'end: expected a number above 0, up to start, got 0'),
        (dict(end=0.2), 'end: expected a number above 0, up to start, got 0'),
        (dict(end=None), 'end: expected .*, got None'),
        (dict(momentum=1), 'momentum: expected 0 <= m < 1, got 1'),
        (dict(momentum=True), 'momentum: expected 0 <= m < 1, got True'),
        (dict(momentum=-0.1), 'momentum: expected 0 <= m < 1, got -0.1'),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(UsageError, match=message):
        HOOKS.build(dict(HOOK, **wrong))


@pytest.mark.parametrize('kind', ['DoReFaWeight', 'L1ScaledWeight'])
def test_values_that_are_no_codes_times_a_scale_are_refused(tmp_path, kind):
    weight = dict(type=f'mmauxq.{kind}', bits=2)
    runner = make_runner(
        tmp_path,
        model=joint_qat(quantizers={**QUANTIZERS, 'weight': weight}),
        custom_hooks=[HOOK],
    )
    with pytest.raises(UsageError, match=f'got {kind}; mmauxq.LSQ and') as got:
        runner.train()
    assert 'backbone.layer1.0.conv1: expected' in str(got.value)
    assert '\n' not in str(got.value)


def test_a_schedule_of_transition_rates_beside_it_is_refused(tmp_path):
    schedule = dict(type='mmauxq.TransitionRateScheduleHook')
    runner = make_runner(tmp_path, custom_hooks=[schedule, HOOK])
    with pytest.raises(UsageError, match='expected no TransitionRateSchedule'):
        runner.train()
