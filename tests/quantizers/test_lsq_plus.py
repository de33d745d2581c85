import pytest
import torch
from torch.testing import assert_close

from mmauxq.quantizers import LSQPlus
from mmauxq.quantizers.functional import learned_step_quantize
from tests.quantizers.test_base import calibrated


def skewed(*shape):
    return torch.nn.functional.silu(torch.randn(shape) * 3)


def min_max(x, bits):
    step = (x.max() - x.min()) / (2**bits - 1)
    return learned_step_quantize(x, step, 0, 2**bits - 1, x.min())


@pytest.mark.parametrize('mean', [0.2, -0.2])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_weights_start_at_three_deviations(bits, mean):
    w = torch.randn(6, 5, 3, 3) + mean
    quantizer = calibrated(LSQPlus(bits, 'weight'), w)
    mean, std = w.mean(), w.std(unbiased=False)
    reach = max(abs(mean - 3 * std), abs(mean + 3 * std))
    assert_close(quantizer.step.item(), reach.item() / 2 ** (bits - 1))


def test_weights_start_per_channel():
    w = torch.randn(3, 50) * torch.tensor([[1.0], [2.0], [3.0]])
    quantizer = calibrated(LSQPlus(4, 'weight', num_channels=3), w)
    each = [calibrated(LSQPlus(4, 'weight'), row).step for row in w]
    assert_close(quantizer.step.detach(), torch.cat(each).detach())


def test_weights_have_no_offset():
    assert list(dict(LSQPlus(4, 'weight').named_parameters())) == ['step']


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_the_start_beats_min_and_max(bits):
    x = skewed(8, 1000)
    y = calibrated(LSQPlus(bits), x)(x)
    error = (y - x).square().mean()
    assert error < (min_max(x, bits) - x).square().mean() * 0.9


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_no_range_of_the_search_has_less_error_than_the_start(bits):
    """Both ends of the range are shrunk by one factor, 0.1 to 1."""
    x = torch.randn(4, 1000) - 1
    low, high, top = x.min(), x.max(), 2**bits - 1

    def error(part):
        step = part * (high - low) / top
        y = learned_step_quantize(x, step, 0, top, part * low)
        return (y - x).square().mean().item()

    parts = torch.linspace(0.1, 1.0, 46)
    best = parts[min(range(46), key=lambda i: error(parts[i]))]
    assert 0.1 < best < 1
    quantizer = calibrated(LSQPlus(bits), x)
    assert_close(quantizer.step.item(), (best * (high - low) / top).item())
    assert_close(quantizer.offset.item(), (best * low).item())


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_each_channel_starts_as_if_it_were_alone(bits):
    x = skewed(8, 3, 100) * torch.tensor([[1.0], [5.0], [0.1]])
    together = LSQPlus(bits, num_channels=3, channel_axis=1)
    calibrated(together, x)
    alone = [calibrated(LSQPlus(bits), x[:, i]) for i in range(3)]
    assert_close(
        together.step.detach(), torch.cat([q.step for q in alone]).detach()
    )
    assert_close(
        together.offset.detach(),
        torch.cat([q.offset for q in alone]).detach(),
    )


def test_evenly_spread_values_are_met_exactly():
    x = torch.tensor([-0.5, 0.5, 1.5, 2.5]).repeat(10)
    quantizer = calibrated(LSQPlus(2), x)
    assert_close(quantizer(x), x, rtol=0, atol=0)
    assert_close(quantizer.offset.item(), -0.5)


def test_a_constant_batch_stays_finite():
    x = torch.full((4, 5), 0.7)
    assert_close(calibrated(LSQPlus(2), x)(x), x)


def test_gradients_are_scaled_as_in_lsq():
    x = skewed(8, 10)
    quantizer = calibrated(LSQPlus(4), x)
    step = quantizer.step.detach().clone().requires_grad_()
    offset = quantizer.offset.detach().clone().requires_grad_()
    learned_step_quantize(x, step, 0, 15, offset).sum().backward()
    quantizer(x).sum().backward()
    factor = (10 * 15) ** -0.5
    assert_close(quantizer.step.grad, step.grad * factor)
    assert_close(quantizer.offset.grad, offset.grad * factor)
