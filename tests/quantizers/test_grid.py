"""The integer form of every quantizer."""

import pytest
import torch

from mmauxq.errors import UsageError
from mmauxq.quantizers import (
    LSQ,
    DoReFaActivation,
    DoReFaWeight,
    L1ScaledWeight,
    LSQPlus,
    PACTActivation,
)
from tests.quantizers.test_base import calibrated

# class, role, lowest code, highest code and their distance at B bits
FORMS = [
    (LSQ, 'weight', lambda b: (-(2 ** (b - 1)), 2 ** (b - 1) - 1, 1)),
    (LSQ, 'activation', lambda b: (0, 2**b - 1, 1)),
    (LSQPlus, 'weight', lambda b: (-(2 ** (b - 1)), 2 ** (b - 1) - 1, 1)),
    (LSQPlus, 'activation', lambda b: (0, 2**b - 1, 1)),
    (PACTActivation, 'activation', lambda b: (0, 2**b - 1, 1)),
    (DoReFaActivation, 'activation', lambda b: (0, 2**b - 1, 1)),
    (DoReFaWeight, 'weight', lambda b: (1 - 2**b, 2**b - 1, 2)),
    (L1ScaledWeight, 'weight', lambda b: (1 - 2**b, 2**b - 1, 2)),
]
every_form = pytest.mark.parametrize('cls, role, expected', FORMS)
each_width = pytest.mark.parametrize('bits', [2, 3, 4, 8])


def sample(role, shape=(4, 3, 8, 8)):
    x = torch.randn(shape) * torch.tensor([0.3, 1.0, 3.0])[:, None, None]
    return x if role == 'weight' else x.abs()


def make(cls, bits, role, num_channels=None):
    """Calibrated on ``sample``, with its channels on axis 1."""
    channels = {}
    if num_channels is not None:
        channels = dict(num_channels=num_channels, channel_axis=1)
    x = sample(role)
    return calibrated(cls(bits, role, **channels), x).eval(), x


@each_width
@every_form
def test_lowest_and_highest_code(cls, role, expected, bits):
    grid = make(cls, bits, role)[0].grid()
    assert (grid.qmin, grid.qmax, grid.stride) == expected(bits)


def test_lsq_activations_below_zero_are_signed():
    grid = calibrated(LSQ(4), torch.randn(4, 5)).grid()
    assert (grid.qmin, grid.qmax) == (-8, 7)


@pytest.mark.parametrize('num_channels', [None, 3])
@each_width
@every_form
def test_values_are_code_times_scale_plus_offset(
    cls, role, expected, bits, num_channels
):
    if num_channels and cls in (DoReFaActivation, DoReFaWeight):
        pytest.skip('has one range in all')
    quantizer, x = make(cls, bits, role, num_channels)
    grid, codes = quantizer.grid(), quantizer.codes(x)
    shape = (1, -1, 1, 1) if num_channels else ()
    value = codes.double() * grid.scale.double().reshape(shape)
    if grid.offset is not None:
        value = value + grid.offset.double().reshape(shape)
    assert codes.dtype == torch.int32
    torch.testing.assert_close(
        quantizer(x).double(), value, rtol=1e-5, atol=1e-6
    )
    assert not ((codes - grid.qmin) % grid.stride).any()
    low, high = codes.min().item(), codes.max().item()
    assert grid.qmin <= low < high <= grid.qmax


@pytest.mark.parametrize('num_channels', [None, 3])
@each_width
@every_form
def test_weights_of_codes_have_these_codes(
    cls, role, expected, bits, num_channels
):
    if num_channels and cls in (DoReFaActivation, DoReFaWeight):
        pytest.skip('has one range in all')
    quantizer, x = make(cls, bits, role, num_channels)
    codes = quantizer.codes(x)
    again = quantizer.weight_of(codes)
    assert again.shape == x.shape and bool(again.isfinite().all())
    assert torch.equal(quantizer(again), quantizer(x))


def test_only_lsq_plus_activations_have_an_offset():
    x = torch.randn(4, 50)
    assert calibrated(LSQPlus(4, 'weight'), x).grid().offset is None
    plus = calibrated(LSQPlus(4), x)
    with torch.no_grad():
        plus.offset.fill_(-0.5)
        plus.step.fill_(0.25)
    grid = plus.grid()
    assert (grid.offset.item(), grid.scale.item()) == (-0.5, 0.25)
    assert not grid.offset.requires_grad and not grid.scale.requires_grad


def test_one_bit_dorefa_weights_have_no_integer_form():
    with pytest.raises(UsageError) as error:
        DoReFaWeight(1).grid()
    assert str(error.value) == ('DoReFaWeight: has no integer form at 1 bits')
