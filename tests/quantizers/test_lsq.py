import pytest
import torch
from torch.testing import assert_close

from mmauxq.errors import UsageError
from mmauxq.quantizers import LSQ
from mmauxq.quantizers.functional import learned_step_quantize
from tests.quantizers.test_base import calibrated


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_weights_start_at_the_step_of_the_paper(bits):
    w = torch.randn(6, 5, 3, 3)
    quantizer = calibrated(LSQ(bits, 'weight'), w)
    qmax = 2 ** (bits - 1) - 1
    assert_close(quantizer.step.item(), 2 * w.abs().mean().item() / qmax**0.5)


@pytest.mark.parametrize('bits', [1, 2, 3, 4, 8])
def test_unsigned_activations_start_at_the_step_of_the_paper(bits):
    x = torch.randn(6, 5, 3, 3).relu()
    quantizer = calibrated(LSQ(bits), x)
    qmax = 2**bits - 1
    assert_close(quantizer.step.item(), 2 * x.mean().item() / qmax**0.5)


def test_the_start_is_computed_per_channel():
    w = torch.randn(6, 5, 3, 3) * torch.arange(1.0, 7).reshape(6, 1, 1, 1)
    quantizer = calibrated(LSQ(4, 'weight', num_channels=6), w)
    expected = [2 * row.abs().mean() / 7**0.5 for row in w]
    assert_close(quantizer.step.detach(), torch.stack(expected))


@pytest.mark.parametrize('axis', [1, -1])
def test_the_start_follows_the_channel_axis(axis):
    x = torch.rand(5, 4, 3, 4) * 3
    quantizer = LSQ(4, num_channels=4, channel_axis=axis)
    calibrated(quantizer, x)
    expected = 2 * x.movedim(axis, 0).flatten(1).mean(1) / 15**0.5
    assert_close(quantizer.step.detach(), expected)


@pytest.mark.parametrize(
    'lowest, signed, codes',
    [(0.0, False, (0, 3)), (-1e-3, True, (-2, 1))],
)
def test_the_sign_of_activations_comes_from_the_data(lowest, signed, codes):
    x = torch.rand(100)
    x[7] = lowest
    quantizer = calibrated(LSQ(2), x)
    found = (quantizer.signed.item(), (quantizer.qmin, quantizer.qmax))
    assert found == (signed, codes)


def test_weights_are_signed_even_if_none_is_negative():
    quantizer = calibrated(LSQ(2, 'weight'), torch.rand(100))
    assert (quantizer.qmin, quantizer.qmax) == (-2, 1)


@pytest.mark.parametrize('lowest', [0.0, -1.0])
def test_the_sign_is_restored_from_the_state(lowest):
    x = torch.rand(100) + lowest
    trained = calibrated(LSQ(2), x)
    loaded = LSQ(2)
    loaded.load_state_dict(trained.state_dict())
    assert (loaded.qmin, loaded.qmax) == (trained.qmin, trained.qmax)


def test_one_bit_refuses_negative_activations():
    with pytest.raises(UsageError) as error:
        calibrated(LSQ(1), torch.randn(100))
    assert str(error.value) == (
        'LSQ: expected at least 2 bits for signed values, got bits=1'
    )


def test_an_all_zero_batch_gives_a_usable_step():
    quantizer = calibrated(LSQ(2), torch.zeros(2, 3))
    assert_close(quantizer.step.item(), 1e-6)


@pytest.mark.parametrize(
    'role, channels, shape, count',
    [
        ('weight', None, (6, 5, 3, 3), 6 * 5 * 3 * 3),
        ('weight', 6, (6, 5, 3, 3), 5 * 3 * 3),
        ('activation', None, (8, 6, 7, 7), 6 * 7 * 7),
        ('activation', 6, (8, 6, 7, 7), 7 * 7),
        ('activation', None, (8, 10), 10),
    ],
)
def test_the_step_gradient_has_the_scale_of_the_paper(
    role, channels, shape, count
):
    """1 / sqrt(N qmax), with N weights or features of one sample."""
    x = torch.randn(shape)
    axis = 0 if role == 'weight' else 1
    quantizer = LSQ(4, role, channels, axis)
    calibrated(quantizer, x)
    step = quantizer.step.detach().clone().requires_grad_()
    spread = [1] * x.dim()
    spread[axis] = -1
    learned_step_quantize(x, step.reshape(spread), -8, 7).sum().backward()
    quantizer(x).sum().backward()
    assert_close(quantizer.step.grad, step.grad / (count * 7) ** 0.5)
