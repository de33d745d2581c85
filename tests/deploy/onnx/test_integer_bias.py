import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mmauxq.deploy.onnx.integer_bias import fit_integer_line, integer_bias


@given(
    st.floats(0.003, 0.9),
    st.floats(-20, 20),
    st.sampled_from([(0, 3), (0, 15), (-8, 7), (0, 1)]),
    st.integers(1, 63),
)
def test_the_line_gives_the_same_codes(slope, bias, limits, factor):
    low, high = limits
    reach = (-2000, 3000)
    line = fit_integer_line(slope, bias, low, high, reach, factor)
    assume(line is not None)
    alpha, integer, spread = line
    assert 1 <= spread <= factor
    n = np.arange(reach[0], reach[1] + 1)
    exact = slope * n + bias
    tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-9
    expected = np.clip(np.rint(exact), low, high)
    # as an integer kernel does it, in float32
    codes = np.float32(alpha) * (spread * n + integer).astype(np.float32)
    codes = np.clip(np.rint(codes), low, high)
    assert ((expected == codes) | tie).all()


def test_there_is_one_for_ordinary_channels():
    rng = np.random.default_rng(0)
    for _ in range(50):
        slope, bias = rng.uniform(0.005, 0.2), rng.normal() * 2
        assert fit_integer_line(slope, bias, 0, 3, (-500, 500), 63) is not None


def with_integer_bias(codes, bits, outputs=(0, 15)):
    rng = np.random.default_rng(1)
    return integer_bias(
        codes, np.full(len(codes), 0.02), rng.normal(size=len(codes)),
        0.05, (0, 2**bits - 1, 0), 0.3, outputs,
    )  # fmt: skip


def test_weights_are_spread_over_the_type():
    codes = np.random.default_rng(0).integers(-8, 8, (6, 20))
    result = with_integer_bias(codes, 4)
    assert result.exact.all() and result.reach == 0
    factors = result.codes[:, codes.any(0)] // np.where(codes == 0, 1, codes)
    assert 64 <= np.abs(result.codes).max() <= 127
    assert (result.bias == np.rint(result.bias)).all()
    assert factors.max() <= 127 // 7


def test_pairs_of_products_fit_16_bits():
    """Kernels without dot-product instructions add two of them there."""
    codes = np.random.default_rng(0).integers(-8, 8, (6, 20))
    result = with_integer_bias(codes, 8)
    assert 2 * 255 * np.abs(result.codes).max() < 2**15


def test_wide_outputs_are_rounded_and_say_how_far():
    codes = np.random.default_rng(0).integers(-8, 8, (6, 20))
    result = with_integer_bias(codes, 4, (0, 255))
    assert not result.exact.any()
    exact = np.random.default_rng(1).normal(size=6)
    off = np.abs(result.bias * 0.05 * result.scale - exact).max() / 0.3
    assert result.reach == pytest.approx(off)
    assert 0 < off <= 0.5 * 0.05 * 0.02 / 0.3
