"""The quantizer of arXiv:2111.14826, and its gradient."""

import pytest
import torch

from mmauxq.quantizers import L1ScaledWeight
from mmauxq.quantizers.functional import half_step_quantize

each_width = pytest.mark.parametrize('bits', [1, 2, 3, 4, 8])


def paper(w: list[float], bits: int) -> tuple[list[float], list[float]]:
    """Values and slopes for one channel, in Python's floats."""
    n, mean = 2**bits - 1, sum(map(abs, w)) / len(w)
    factor = 2 ** (bits - 1) / n / mean
    values, slopes = [], []
    for x in w:
        clipped = min(max(factor * x, -1), 1)
        values.append((round(n / 2 * (clipped + 1)) * 2 / n - 1) / factor)
        slopes.append(float(abs(factor * x) < 1))
    return values, slopes


def calibrated(bits: int, w: torch.Tensor, channels=None) -> L1ScaledWeight:
    quantizer = L1ScaledWeight(bits, num_channels=channels).double()
    quantizer.calibrate(w)
    return quantizer


@pytest.mark.parametrize('channels', [None, 5])
@each_width
def test_values_and_gradient_are_those_of_the_paper(bits, channels):
    torch.manual_seed(bits)
    w = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    w *= torch.arange(1, 6).reshape(-1, 1, 1, 1)
    rows = w.reshape(channels or 1, -1)
    expected = [paper(row.tolist(), bits) for row in rows]
    w.requires_grad_()
    result = calibrated(bits, w, channels)(w)
    torch.testing.assert_close(
        result.reshape(rows.shape),
        torch.tensor([values for values, _ in expected]).double(),
        rtol=1e-6,
        atol=0,
    )
    incoming = torch.randn_like(w)
    (grad,) = torch.autograd.grad(result, w, incoming)
    slopes = torch.tensor([slopes for _, slopes in expected]).double()
    assert torch.equal(grad, incoming * slopes.reshape(w.shape))


def test_no_code_is_rare_at_2_bits():
    """Of a Laplace distribution, exp(-1) lie beyond the mean magnitude."""
    torch.manual_seed(0)
    w = torch.distributions.Laplace(0.0, 0.3).sample((100_000,))
    quantizer = L1ScaledWeight(2)
    quantizer.calibrate(w)
    parts = quantizer.codes(w).unique(return_counts=True)[1] / len(w)
    assert parts.tolist() == pytest.approx([0.18, 0.32, 0.32, 0.18], abs=0.01)


def test_the_mean_is_taken_in_training_and_kept_in_evaluation():
    w = torch.randn(6, 8)
    quantizer = calibrated(2, w, 6)
    quantizer(3 * w)
    torch.testing.assert_close(quantizer.step, (3 * w).double().abs().mean(1))
    before = quantizer.step.clone()
    quantizer.eval()(w)
    assert torch.equal(quantizer.step, before)
    assert list(quantizer.parameters()) == []


def test_dtype_and_zeros():
    w = torch.randn(4, 4).bfloat16()
    assert half_step_quantize(w, torch.tensor(0.5), 2).dtype == torch.bfloat16
    quantizer = L1ScaledWeight(2)
    quantizer.calibrate(torch.zeros(3))
    assert bool(quantizer(torch.zeros(3)).isfinite().all())
