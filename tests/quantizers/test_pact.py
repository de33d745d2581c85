import pytest
import torch
from torch.testing import assert_close

from mmauxq.quantizers import PACTActivation
from mmauxq.quantizers.functional import pact
from tests.quantizers.test_base import calibrated


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_alpha_starts_at_the_range_of_lsq(bits):
    x = torch.rand(8, 50)
    x[0, 0] = 100.0
    quantizer = calibrated(PACTActivation(bits), x)
    expected = 2 * x.mean().item() * (2**bits - 1) ** 0.5
    assert_close(quantizer.alpha.item(), expected)


def test_alpha_starts_per_channel():
    x = torch.rand(8, 3, 5, 5) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    x[0, :, 0, 0] = 100.0
    quantizer = calibrated(PACTActivation(2, num_channels=3), x)
    expected = 2 * x.movedim(1, 0).flatten(1).mean(1) * 3**0.5
    assert_close(quantizer.alpha.detach(), expected)


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_alpha_starts_no_higher_than_the_largest_value(bits):
    """Above it, alpha would never get a gradient."""
    x = torch.rand(8, 50) + 0.5
    quantizer = calibrated(PACTActivation(bits), x)
    assert quantizer.alpha.item() == x.max().item()


def test_forward_is_the_op():
    x = torch.rand(8, 3, 5, 5)
    quantizer = calibrated(PACTActivation(2, num_channels=3), x)
    alpha = quantizer.alpha.reshape(1, 3, 1, 1)
    assert torch.equal(quantizer(x), pact(x, alpha, 2))


def test_negative_inputs_are_reported(warnings_logged):
    x = torch.tensor([-1.0, 1.0, 2.0, 3.0])
    calibrated(PACTActivation(2), x)
    assert warnings_logged == [
        'PACTActivation: 25% of the values that reach this quantizer are '
        'negative and become 0; LSQ or LSQPlus take signed values'
    ]


def test_inputs_without_negatives_are_not_reported(warnings_logged):
    calibrated(PACTActivation(2), torch.tensor([0.0, 1.0, 2.0]))
    assert warnings_logged == []
