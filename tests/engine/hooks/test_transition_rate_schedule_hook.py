import copy
import math

import pytest
import torch
from torch import nn

from mmauxq.engine.hooks import TransitionRateSchedule
from mmauxq.engine.hooks.transition_rate_schedule_hook import STATE
from mmauxq.engine.resume import resume
from mmauxq.errors import UsageError
from mmauxq.layers import QuantLinear
from mmauxq.quantizers import LSQ
from mmauxq.registry import HOOKS
from tests.engine.hooks.test_transition_rate_hook import scalars
from tests.running import make_runner, state

HOOK = dict(type='mmauxq.TransitionRateScheduleHook')
OPTIMIZERS = [
    (torch.optim.SGD, dict(momentum=0.9, nesterov=True, weight_decay=1e-2)),
    (torch.optim.Adam, dict(weight_decay=1e-2)),
    (torch.optim.AdamW, dict(weight_decay=0.1)),
]


def network(seed: int = 0) -> nn.Sequential:
    """Two quantized layers with a float one behind, float64, calibrated."""
    torch.manual_seed(seed)
    layers = []
    for _ in range(2):
        float_layer = nn.Linear(12, 12)
        layer = QuantLinear.from_float(
            float_layer, LSQ(2, 'weight'), LSQ(4, 'activation')
        )
        layer.weight_quantizer.calibrate(layer.weight)
        layer.input_quantizer.calibrate(torch.randn(8, 12))
        layers.append(layer)
    return nn.Sequential(*layers, nn.Linear(12, 3)).double()


def backward(net: nn.Module, step: int) -> None:
    torch.manual_seed(100 + step)
    x, y = torch.randn(2, 16, 12, dtype=torch.float64)
    net.zero_grad()
    (net(x) - y[:, :3]).square().mean().backward()


def settings(**changes) -> dict:
    values = dict(rate=0.02, gain=0.1, momentum=0.7, train_steps=False)
    return {**values, **changes}


@pytest.mark.parametrize('lr', [0.05, 0.01])
@pytest.mark.parametrize('kind, options', OPTIMIZERS)
def test_formula(kind, options, lr):
    """Against an optimizer of its own for each layer, whose learning rate is
    set by the formula in Python's floats."""
    net, steps = network(), 12
    optimizer = kind(net.parameters(), lr=lr, **options)
    schedule = TransitionRateSchedule(net, optimizer, **settings())

    twin = network()
    layers = [twin[0], twin[1]]
    own = [kind([layer.weight], lr=lr, **options) for layer in layers]
    rest = kind(
        [layer.bias for layer in layers]
        + [layer.input_quantizer.step for layer in layers]
        + list(twin[2].parameters()),
        lr=lr,
        **options,
    )
    size, rate = [lr, lr], [0.02, 0.02]
    for t in range(steps):
        schedule.progress = t / steps
        optimizer.param_groups[0]['lr'] = lr / (1 + t)  # of all others
        rest.param_groups[0]['lr'] = lr / (1 + t)
        backward(net, t)
        optimizer.step()
        backward(twin, t)
        rest.step()
        target = 0.02 * (1 + math.cos(math.pi * t / steps)) / 2
        for i, layer in enumerate(layers):
            before = layer.weight_quantizer.codes(layer.weight)
            own[i].param_groups[0]['lr'] = size[i]
            own[i].step()
            after = layer.weight_quantizer.codes(layer.weight)
            k = (before != after).double().mean().item()
            rate[i] = 0.7 * rate[i] + 0.3 * k
            eta = 0.1 * lr / 0.02
            size[i] = max(0.0, size[i] + eta * (target - rate[i]))
        assert schedule.rates.tolist() == pytest.approx(rate, abs=1e-12)
        assert schedule.step_sizes.tolist() == pytest.approx(size, abs=1e-12)
    # Adam's first steps change too many codes at the higher rate
    fast = lr == 0.05 and kind is not torch.optim.SGD
    assert size == [0, 0] if fast else lr != size[0] != size[1] != lr
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize('kind, options', OPTIMIZERS)
def test_with_steps_of_the_learning_rate_it_is_the_optimizer(kind, options):
    net, twin = network(), network()
    optimizer = kind(net.parameters(), lr=0.05, **options)
    plain = kind(twin.parameters(), lr=0.05, **options)
    schedule = TransitionRateSchedule(
        net, optimizer, **settings(train_steps=True)
    )
    for t in range(5):
        backward(net, t)
        optimizer.step()
        schedule.step_sizes.fill_(0.05)
        backward(twin, t)
        plain.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_optimizer_is_left_as_it_was():
    """What a checkpoint, a scheduler or a loss scaler sees of it."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    groups = copy.copy(optimizer.param_groups)
    expected = copy.deepcopy(optimizer.state_dict()['param_groups'])
    TransitionRateSchedule(net, optimizer, **settings())
    backward(net, 0)
    optimizer.step()
    assert all(
        a is b for a, b in zip(groups, optimizer.param_groups, strict=True)
    )
    assert optimizer.state_dict()['param_groups'] == expected


class Counting(torch.optim.SGD):
    """Counts its steps in the group, as some optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group['count'] = group.get('count', 0) + 1
        return super().step(closure)


def test_what_an_optimizer_keeps_in_its_group_stays():
    net = network()
    optimizer = Counting(net.parameters(), lr=0.05)
    TransitionRateSchedule(net, optimizer, **settings())
    for t in range(3):
        backward(net, t)
        optimizer.step()
    assert optimizer.param_groups[0]['count'] == 3
    assert optimizer.param_groups[0]['lr'] == 0.05
    assert len(optimizer.param_groups[0]['params']) == 10


def test_steps_of_weights_are_trained_if_asked_for():
    for trained in (False, True):
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        TransitionRateSchedule(net, optimizer, **settings(train_steps=trained))
        before = [q.step.clone() for q in (q_of(net))]
        backward(net, 0)
        optimizer.step()
        moved = [
            not torch.equal(q.step, b)
            for q, b in zip(q_of(net), before, strict=True)
        ]
        # weight, activation, weight, activation
        assert moved == [trained, True, trained, True]


def q_of(net):
    return [
        q for la in net[:2] for q in (la.weight_quantizer, la.input_quantizer)
    ]


def test_the_rate_follows_its_target():
    """Weights that noise moves about change as many codes as asked for."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    schedule = TransitionRateSchedule(
        net, optimizer, **settings(rate=0.05, gain=0.05, momentum=0.9)
    )
    found = []
    for t in range(600):
        torch.manual_seed(t)
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter) + parameter
        optimizer.step()
        found.append(schedule.last)
    mean = torch.stack(found[200:]).mean(0)
    assert mean.tolist() == pytest.approx([0.05, 0.05], rel=0.05)


# --- in a run --------------------------------------------------------------


def test_the_target_is_a_cosine_and_both_are_in_the_log(tmp_path):
    """Weights move whatever the learning rate of the others is."""
    runner = make_runner(
        tmp_path,
        custom_hooks=[HOOK],
        train_cfg=dict(type='mmauxq.EpochLoop', max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.3)),
        param_scheduler=dict(type='ConstantLR', factor=1e-9, end=9),
    )
    runner.train()
    lines = scalars(tmp_path)
    assert [line['transition_rate_target'] for line in lines] == pytest.approx(
        [0.005 * (1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]
    )
    (hook,) = (h for h in runner.hooks if hasattr(h, 'schedule'))
    assert lines[-1]['transition_rate'] == hook.schedule.last.mean().item()
    assert lines[-1]['lr'] == pytest.approx(3e-10)
    assert all(line['transition_rate'] > 0 for line in lines)


def test_a_resumed_run_goes_on_as_the_whole(tmp_path):
    hooks = [dict(HOOK, gain=0.3, momentum=0.5)]
    twice = dict(
        custom_hooks=hooks,
        train_cfg=dict(type='mmauxq.EpochLoop', max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.3, momentum=0.9)),
        param_scheduler=dict(type='CosineAnnealingLR', T_max=2),
    )
    whole = make_runner(tmp_path / 'whole', **twice)
    whole.train()
    resumed = make_runner(tmp_path / 'resumed', **twice)
    checkpoint = str(tmp_path / 'whole/epoch_1.pth')
    resumed._resume, resumed._load_from = True, checkpoint
    resumed.load_or_resume = lambda: resume(resumed, checkpoint)
    resumed.train()
    assert resumed.iter == 8
    sizes = [
        hook.schedule.step_sizes
        for runner in (whole, resumed)
        for hook in runner.hooks
        if hasattr(hook, 'schedule')
    ]
    assert torch.equal(*sizes) and len(set(sizes[0].tolist())) > 1
    for key, value in state(whole.model).items():
        assert torch.equal(value, state(resumed.model)[key]), key


def test_the_state_of_another_network_is_refused(tmp_path):
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    schedule = TransitionRateSchedule(net, optimizer, **settings())
    kept = schedule.state_dict()
    schedule.load_state_dict(kept, 'a.pth')
    for value, expected in [
        (dict(rates=kept['rates']), r'step_sizes: expected a tensor of shape'),
        (dict(kept, rates=torch.ones(3)), r'rates: expected a tensor of sha'),
        (dict(kept, rates=kept['rates'] * math.nan), 'expected finite numb'),
        (3, 'expected a dict, got 3'),
    ]:
        with pytest.raises(
            UsageError, match=f'checkpoint a.pth: {STATE}.*{expected}'
        ):
            schedule.load_state_dict(value, 'a.pth')


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(rate=0), 'rate: expected a number above 0, up to 1, got 0'),
        (dict(rate=1.5), 'rate: expected a number above 0, up to 1, got 1.5'),
        (dict(rate='0.1'), "rate: expected .*, got '0.1'"),
        (dict(rate=math.nan), 'rate: expected .*, got nan'),
        (dict(gain=-1), 'gain: expected a number above 0, got -1'),
        (dict(momentum=1), 'momentum: expected 0 <= m < 1, got 1'),
        (dict(train_steps=1), 'train_steps: expected True or False, got 1'),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(UsageError, match=message):
        HOOKS.build(dict(HOOK, **wrong))


def test_weights_without_an_optimizer():
    net = network()
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.05)
    with pytest.raises(UsageError, match='got one without that of 1$'):
        TransitionRateSchedule(net, optimizer, **settings())
