"""Strided convolutions of images as convolutions of blocks."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmauxq.accelerate.space_to_depth import convolve, takes


def images(*shape, **how):
    x = torch.rand(shape, **how)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('with_bias', [False, True])
@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize(
    'kernel, padding, size',
    [
        (7, 3, (32, 32)), (7, 3, (33, 46)), (3, 1, (20, 21)), (3, 0, (9, 8)),
        (5, 2, (17, 16)), ((7, 3), (3, 1), (15, 18)), (2, 0, (12, 13)),
        (4, (1, 2), (11, 10)), (2, 2, (3, 2)),
    ],
)  # fmt: skip
def test_equals_the_convolution(kernel, padding, size, channels, with_bias):
    torch.manual_seed(0)
    x = images(2, channels, *size, dtype=torch.double)
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    weight = torch.randn(5, channels, kh, kw, dtype=torch.double)
    bias = torch.randn(5, dtype=torch.double) if with_bias else None
    inputs = [t.requires_grad_() for t in (weight, bias) if t is not None]
    expected = F.conv2d(x, weight, bias, 2, padding)
    assert takes(x, weight, bias, 2, padding)
    found = convolve(x, weight, bias, padding)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close(found, expected)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_weights_in_any_layout():
    x, weight = images(2, 3, 9, 9), torch.randn(8, 3, 3, 3)
    expected = convolve(x, weight, None, 1)
    last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(convolve(x, last, None, 1), expected)


def test_what_is_taken():
    x, w = images(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    assert takes(x, w, None, 2, 1) and takes(x, w, None, (2, 2), [1, 1])
    assert not takes(x, w, None, 1, 1) and not takes(x, w, None, (2, 1), 1)
    assert not takes(x, w, None, 2, 1, 2) and not takes(x, w, None, 2, 'valid')
    assert not takes(x, w[:, :1], None, 2, 1, 1, 3)
    assert not takes(x, w[..., :1, :1], None, 2)
    assert not takes(x.contiguous(), w, None, 2, 1)
    assert not takes(x[0], w, None, 2, 1)
    assert not takes(x, torch.randn(4, 3, 9, 9), None, 2)  # torch refuses it
    assert not takes(images(2, 5, 8, 8), torch.randn(4, 5, 3, 3), None, 2, 1)
    assert not takes(x.requires_grad_(), w, None, 2, 1)
