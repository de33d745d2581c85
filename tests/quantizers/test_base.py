"""What holds for every quantizer."""

import copy

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import nn

from mmauxq.errors import TrainingError, UsageError
from mmauxq.quantizers import (
    LSQ,
    DoReFaActivation,
    DoReFaWeight,
    L1ScaledWeight,
    LSQPlus,
    PACTActivation,
    Quantizer,
    calibrate,
    named_quantizers,
)

ALL = [
    LSQ, LSQPlus, PACTActivation, DoReFaActivation, DoReFaWeight,
    L1ScaledWeight,
]  # fmt: skip
LEARNED = [
    (LSQ, 'weight'),
    (LSQ, 'activation'),
    (LSQPlus, 'weight'),
    (LSQPlus, 'activation'),
    (PACTActivation, 'activation'),
]
learned = pytest.mark.parametrize('cls, role', LEARNED)


def calibrated(quantizer, x):
    calibrate(quantizer, lambda: quantizer(x))
    return quantizer


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


MOST = dict(weight=8, activation=16)
ALL_ROLES = [(cls, role) for cls in ALL for role in cls.roles]


@pytest.mark.parametrize('cls, role', ALL_ROLES)
def test_allowed_bits(cls, role):
    lowest = 2 if (cls in (LSQ, LSQPlus) and role == 'weight') else 1
    for bits in (*range(lowest, MOST[role] + 1), 32):
        assert cls(bits, role).bits == bits


@pytest.mark.parametrize('bits', [0, -2, 17, 31, 33, 2.0, '4', True, None])
@pytest.mark.parametrize('cls, role', ALL_ROLES)
def test_refused_bits(cls, role, bits):
    with pytest.raises(UsageError) as error:
        cls(bits, role)
    assert str(error.value) == (
        f'{cls.__name__}: expected bits from 1 to {MOST[role]}, or 32 for '
        f'floating point, got bits={bits!r}'
    )


@pytest.mark.parametrize('cls', [LSQ, LSQPlus, DoReFaWeight, L1ScaledWeight])
def test_weights_have_8_bits_at_most(cls):
    with pytest.raises(UsageError, match='bits from 1 to 8, or 32'):
        cls(9, 'weight')


@pytest.mark.parametrize('cls', [LSQ, LSQPlus, PACTActivation])
def test_all_codes_of_16_bits_are_exact(cls):
    quantizer = calibrated(cls(16, 'activation'), torch.rand(4, 8) + 1)
    getattr(quantizer, quantizer.scale).data.fill_(
        2**-7 if quantizer.scale == 'step' else 511.9921875
    )
    grid = quantizer.grid()
    expected = torch.arange(grid.qmin, grid.qmax + 1)
    values = expected * grid.scale
    if grid.offset is not None:
        values = values + grid.offset
    assert torch.equal(quantizer.codes(values), expected.to(torch.int32))
    assert torch.equal(quantizer(values), values)


def test_one_bit_lsq_weights_are_refused():
    with pytest.raises(UsageError) as error:
        LSQ(1, 'weight')
    assert str(error.value) == (
        'LSQ: expected at least 2 bits for signed values, got bits=1'
    )


def test_one_bit_lsq_plus_weights_are_refused():
    with pytest.raises(UsageError) as error:
        LSQPlus(1, 'weight')
    assert str(error.value) == (
        'LSQPlus: expected at least 2 bits for signed values, got bits=1'
    )


@pytest.mark.parametrize(
    'cls, role, allowed',
    [
        (LSQ, 'bias', ['weight', 'activation']),
        (PACTActivation, 'weight', ['activation']),
        (DoReFaActivation, 'weight', ['activation']),
        (DoReFaWeight, 'activation', ['weight']),
        (L1ScaledWeight, 'activation', ['weight']),
    ],
)
def test_refused_roles(cls, role, allowed):
    with pytest.raises(UsageError) as error:
        cls(4, role)
    assert str(error.value) == (
        f'{cls.__name__}: expected a role out of {allowed}, got {role!r}'
    )


@pytest.mark.parametrize('cls', ALL)
def test_32_bits_is_the_identity(cls):
    x = torch.randn(2, 3)
    assert cls(32)(x) is x


@pytest.mark.parametrize('cls', ALL)
def test_32_bits_trains_nothing(cls):
    assert not any(p.requires_grad for p in cls(32).parameters())


def test_32_bits_is_not_counted_as_a_quantizer():
    model = nn.ModuleDict({'a': LSQ(32), 'b': LSQ(4)})
    assert [name for name, _ in named_quantizers(model)] == ['b']


@pytest.mark.parametrize('training', [True, False])
@learned
def test_forward_without_calibration_is_refused(cls, role, training):
    quantizer = cls(4, role).train(training)
    with pytest.raises(UsageError) as error:
        quantizer(torch.randn(2, 3))
    assert str(error.value) == (
        f'{cls.__name__}: was never calibrated; train it, or load a '
        'checkpoint of a trained quantized network'
    )


@pytest.mark.parametrize('cls', [DoReFaActivation, DoReFaWeight])
def test_a_fixed_range_needs_no_calibration(cls):
    assert cls(4)(torch.randn(50)).unique().numel() <= 16


@learned
def test_calibration_is_flagged(cls, role):
    quantizer = cls(4, role)
    before = quantizer.calibrated.item()
    calibrated(quantizer, torch.rand(4, 5))
    assert (before, quantizer.calibrated.item()) == (False, True)


@learned
def test_a_loaded_quantizer_computes_the_same(cls, role):
    x = torch.randn(4, 5).abs()
    trained = calibrated(cls(2, role), x)
    loaded = cls(2, role)
    loaded.load_state_dict(trained.state_dict())
    assert torch.equal(loaded(x), trained(x))


@learned
def test_loading_an_uncalibrated_state_undoes_calibration(cls, role):
    quantizer = calibrated(cls(2, role), torch.rand(4, 5))
    quantizer.load_state_dict(cls(2, role).state_dict())
    with pytest.raises(UsageError, match='never calibrated'):
        quantizer(torch.rand(4, 5))


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('num_channels', [None, 3])
@learned
def test_every_scale_gets_a_gradient_and_moves(cls, role, num_channels, bits):
    axis = 0 if role == 'weight' else 1
    quantizer = cls(bits, role, num_channels=num_channels, channel_axis=axis)
    x = torch.randn(3, 3, 5, 5) + 0.5
    calibrated(quantizer, x)
    before = copy.deepcopy(quantizer)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    (quantizer(x) * torch.randn_like(x)).sum().backward()
    optimizer.step()
    moved = [
        bool(((new != old) & (new.grad != 0)).all())
        for new, old in zip(
            quantizer.parameters(), before.parameters(), strict=True
        )
    ]
    assert moved and all(moved)


@pytest.mark.parametrize('num_channels', [None, 3])
@learned
def test_there_is_one_scale_for_each_channel(cls, role, num_channels):
    quantizer = cls(2, role, num_channels=num_channels)
    shapes = {tuple(p.shape) for p in quantizer.parameters()}
    assert shapes == {(num_channels or 1,)}


@pytest.mark.parametrize('axis', [0, 1, -1])
@learned
def test_each_channel_has_at_most_two_to_the_bits_levels(cls, role, axis):
    quantizer = cls(2, role, num_channels=4, channel_axis=axis)
    x = torch.randn(4, 4, 50, 4) * torch.tensor([0.1, 1.0, 10.0, 100.0])
    y = calibrated(quantizer, x)(x).movedim(axis, 0)
    assert max(len(channel.unique()) for channel in y) <= 4


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@learned
def test_half_precision_keeps_its_dtype(cls, role, dtype):
    x = torch.rand(4, 5).to(dtype)
    assert calibrated(cls(2, role), x)(x).dtype == dtype


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@learned
def test_half_precision_input_gives_float32_scale_gradients(cls, role, dtype):
    x = torch.randn(4, 50).to(dtype)
    quantizer = calibrated(cls(2, role), x)
    quantizer(x).sum().backward()
    assert {p.grad.dtype for p in quantizer.parameters()} == {torch.float32}


@learned
def test_a_scale_below_zero_still_works_and_comes_back(cls, role):
    x = torch.rand(4, 50) + 0.1
    quantizer = calibrated(cls(2, role), x)
    scale = next(quantizer.parameters())
    with torch.no_grad():
        scale.fill_(-1.0)
    y = quantizer(x)
    (y - x).square().sum().backward()
    assert bool(y.isfinite().all()) and scale.grad.item() < 0


@learned
def test_a_moving_average_follows_the_calibration(cls, role):
    """It is copied before calibration, and only its tensors are updated."""
    source = cls(2, role)
    average = ExponentialMovingAverage(source)
    x = torch.randn(4, 50)
    calibrated(source, x)
    average.update_parameters(source)
    assert torch.equal(average(x), source(x))


@learned
def test_a_copy_shares_nothing(cls, role):
    x = torch.rand(4, 50)
    quantizer = calibrated(cls(2, role), x)
    expected = quantizer(x)
    twin = copy.deepcopy(quantizer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(3)
    assert torch.equal(quantizer(x), expected)


def test_flags_are_of_a_type_that_ranks_can_average():
    quantizer = LSQ(2)
    assert quantizer.calibrated.dtype == torch.uint8
    assert quantizer.signed.dtype == torch.uint8


def test_a_quantizer_of_ones_own_needs_bits_only():
    class Half(Quantizer):
        needs_calibration = False

        def quantize(self, x):
            return x / 2

    half = Half(3)
    assert (half.role, half.num_channels, half.channel_axis) == (
        'activation',
        None,
        1,
    )
    assert half(torch.tensor([3.0])).item() == 1.5


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_first_batch_that_is_not_finite_is_refused(value):
    with pytest.raises(TrainingError) as error:
        calibrated(LSQ(2), torch.tensor([[1.0, value]]))
    assert str(error.value) == (
        'LSQ: expected finite values to calibrate with, got NaN or infinity'
    )


def test_the_flag_on_the_device_is_asked_once():
    """Asking it would stall every step."""
    quantizer = calibrated(LSQ(2), torch.rand(4, 5))
    expected = quantizer(torch.ones(2))
    quantizer.calibrated.zero_()
    assert torch.equal(quantizer(torch.ones(2)), expected)


@pytest.mark.parametrize('cls', [LSQ, LSQPlus])
@pytest.mark.parametrize(
    'role, num_channels, axis, shape, count',
    [
        ('weight', None, 0, (4, 3, 2, 2), 48),
        ('weight', 4, 0, (4, 3, 2, 2), 12),
        ('activation', None, 0, (4, 3, 2, 2), 12),
        ('activation', 3, 1, (4, 3, 2, 2), 4),
        ('activation', None, 0, (7,), 7),
        ('activation', None, 0, (5, 1), 1),
    ],
)
def test_gradient_scale(cls, role, num_channels, axis, shape, count):
    """1 / sqrt(N qmax), N the values of a sample that share the step."""
    quantizer = cls(3, role, num_channels, axis)
    x = torch.rand(shape)
    calibrated(quantizer, x)
    expected = (count * (3 if role == 'weight' else 7)) ** -0.5
    assert quantizer.grad_scale(x) == pytest.approx(expected)


@learned
def test_channels_of_weights_lie_on_axis_0_those_of_activations_on_1(
    cls, role
):
    axis = 0 if role == 'weight' else 1
    assert cls(2, role).channel_axis == axis
    assert cls(2, role, channel_axis=-1).channel_axis == -1


def test_repr_names_bits_role_and_channels():
    assert repr(LSQ(2, 'weight', 3)) == (
        "LSQ(bits=2, role='weight', num_channels=3)"
    )
    assert repr(LSQ(2)) == "LSQ(bits=2, role='activation')"
