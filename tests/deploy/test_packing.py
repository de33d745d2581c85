import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmauxq.deploy.packing import pack, unpack
from mmauxq.errors import UsageError


@given(st.integers(1, 8), st.data())
def test_codes_come_back(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    packed = pack(np.array(codes, int), bits)
    assert len(packed) == -(-len(codes) * bits // 8)
    assert unpack(packed, bits, len(codes)).tolist() == codes


def test_lowest_bit_first():
    assert pack(np.array([1, 2, 3, 0]), 2).tolist() == [0b00111001]
    assert pack(np.array([5, 3, 7]), 3).tolist() == [0b11011101, 0b1]


@pytest.mark.parametrize('codes', [[4], [-1]])
def test_a_code_that_does_not_fit(codes):
    with pytest.raises(UsageError, match='expected codes from 0 to 3, got'):
        pack(np.array(codes), 2)


def test_a_cut_row():
    with pytest.raises(UsageError, match='2 bits: expected 3 bytes, got 1'):
        unpack(np.zeros(1, np.uint8), 2, 9)
