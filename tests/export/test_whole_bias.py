import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from mmauxq.export.whole_bias import exact_line


@given(
    st.floats(0.003, 0.9),
    st.floats(-20, 20),
    st.sampled_from([(0, 3), (0, 15), (-8, 7), (0, 1)]),
    st.integers(1, 63),
)
def test_the_line_gives_the_same_codes(slope, bias, limits, factor):
    low, high = limits
    reach = (-2000, 3000)
    found = exact_line(slope, bias, low, high, reach, factor)
    assume(found is not None)
    alpha, whole, spread = found
    assert 1 <= spread <= factor
    n = np.arange(reach[0], reach[1] + 1)
    exact = slope * n + bias
    tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-9
    want = np.clip(np.rint(exact), low, high)
    # as an integer kernel does it, in float32
    have = np.float32(alpha) * (spread * n + whole).astype(np.float32)
    have = np.clip(np.rint(have), low, high)
    assert ((want == have) | tie).all()


def test_there_is_one_for_ordinary_channels():
    rng = np.random.default_rng(0)
    for _ in range(50):
        slope, bias = rng.uniform(0.005, 0.2), rng.normal() * 2
        assert exact_line(slope, bias, 0, 3, (-500, 500), 63) is not None
