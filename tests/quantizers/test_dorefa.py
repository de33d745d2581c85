import pytest
import torch

from mmauxq.quantizers import DoReFaActivation, DoReFaWeight
from mmauxq.quantizers import functional as ops

COLLAPSE = (
    'DoReFaActivation: the fixed range [0, 1] at 2 bits is known to collapse '
    'on post-activation ResNets; LSQ or PACTActivation learn the range'
)


@pytest.fixture(autouse=True)
def not_warned_yet(monkeypatch):
    monkeypatch.setattr(DoReFaActivation, '_warned', False)


@pytest.mark.parametrize(
    'cls, op',
    [
        (DoReFaWeight, ops.dorefa_weight),
        (DoReFaActivation, ops.dorefa_activation),
    ],
)
@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_forward_is_the_op(cls, op, bits):
    x = torch.randn(50)
    assert torch.equal(cls(bits)(x), op(x, bits))


@pytest.mark.parametrize('cls', [DoReFaWeight, DoReFaActivation])
def test_nothing_is_learned(cls):
    assert list(cls(4).parameters()) == []


def test_low_bits_warn_once(warnings_logged):
    for _ in range(3):
        DoReFaActivation(2)
    assert warnings_logged == [COLLAPSE]


@pytest.mark.parametrize('bits', [4, 8, 32])
def test_four_bits_and_more_do_not_warn(warnings_logged, bits):
    DoReFaActivation(bits)
    assert warnings_logged == []
