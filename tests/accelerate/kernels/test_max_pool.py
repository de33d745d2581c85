"""Max pooling against torch."""

import pytest
import torch
import torch.nn.functional as F

from mmauxq.accelerate.kernels import max_pool as max_pool_module
from mmauxq.accelerate.kernels.dispatch import use_form
from mmauxq.accelerate.kernels.max_pool import can_pool, max_pool

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Triton's interpreter rounds to bfloat16 by cutting off
HALF = torch.float16 if DEVICE == 'cpu' else torch.bfloat16
# kernel, stride, padding: side by side, overlapping, with gaps in between
WINDOWS = [
    (2, None, 0), (3, 2, 1), (3, 1, 1), ((3, 2), (2, 1), (1, 0)), (5, 3, 2),
    (2, 3, 1), (1, 2, 0),
]  # fmt: skip
# odd sizes; channels in several tiles, the last of them not full
SHAPES = [(3, 3, 9, 7), (2, 130, 6, 5), (2, 8, 13, 20), (1, 1, 3, 2)]


@pytest.fixture(autouse=True)
def kernel(poisoned):
    with use_form('kernel'):
        yield


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def feature_map(*shape, dtype=torch.float32):
    x = channels_last(torch.randn(shape).to(DEVICE, dtype))
    return x.requires_grad_()


def compare(x, window, upstream=None, wide=False):
    """Values and gradients are those of torch, to the bit; for ``wide`` the
    gradients that torch adds in float32."""
    assert can_pool(x, *window)
    found = max_pool(x, *window)
    expected = F.max_pool2d(x, *window)
    same(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    if upstream is None:
        upstream = torch.randn_like(expected)
    (ours,) = torch.autograd.grad(found, x, upstream)
    if wide:
        x = x.detach().float().requires_grad_()
        expected, upstream = F.max_pool2d(x, *window), upstream.float()
    (theirs,) = torch.autograd.grad(expected, x, upstream)
    same(ours, theirs.to(ours.dtype))
    assert ours.is_contiguous(memory_format=torch.channels_last)


def same(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    # with NaN in the same places, zeros of the same sign
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize('window', WINDOWS, ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_equals_torch(shape, window):
    compare(feature_map(*shape), window)


@pytest.mark.parametrize('window', WINDOWS, ids=str)
def test_gradients_in_half_precision_are_added_in_float32(window):
    compare(feature_map(2, 5, 13, 11, dtype=HALF), window, wide=True)


@pytest.mark.parametrize('window', WINDOWS, ids=str)
@pytest.mark.parametrize('kind', ['rectified', 'equal', 'zeros'])
def test_the_first_of_equal_values_is_the_maximum(kind, window):
    x = feature_map(2, 5, 9, 11).detach()
    if kind == 'zeros':
        x = x.sign() * 0.0  # of either sign, which are equal
    else:
        x = (x - 1).relu() if kind == 'rectified' else x * 0 - 2
    compare(x.requires_grad_(), window)


# on a GPU torch gives the gradient of a window of -inf to another pixel
@pytest.mark.skipif(DEVICE == 'cuda', reason='torch differs there')
@pytest.mark.parametrize('window', WINDOWS, ids=str)
def test_infinite_values(window):
    x = feature_map(2, 5, 9, 11).detach()
    x[0, 1] = x[1, :, 4] = x[1, :, :5, 3:7] = -torch.inf
    x[0, 2, 3:5] = torch.inf
    compare(x.requires_grad_(), window)


@pytest.mark.parametrize('window', WINDOWS, ids=str)
def test_the_last_nan_is_the_maximum(window):
    x = feature_map(2, 5, 9, 11).detach()
    x[torch.rand_like(x) < 0.2] = torch.nan
    x[0, 0] = torch.nan
    compare(x.requires_grad_(), window)


@pytest.mark.parametrize('layout', ['expanded', 'contiguous', 'sliced'])
def test_a_gradient_in_another_layout(layout):
    x = feature_map(2, 6, 9, 7)
    upstream = {
        'expanded': torch.randn(2, 6, 1, 1).expand(2, 6, 5, 4),
        'contiguous': torch.randn(2, 6, 5, 4),
        'sliced': channels_last(torch.randn(2, 12, 5, 4))[:, ::2],
    }[layout].to(DEVICE)
    compare(x, (3, 2, 1), upstream)


def test_with_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr(max_pool_module, 'is_wide', lambda x: True)
    compare(feature_map(2, 130, 6, 5), (3, 2, 1))


def test_only_a_byte_for_each_maximum_is_kept():
    x, saved = feature_map(2, 6, 9, 7), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        y = max_pool(x, 3, 2, 1)
    (places,) = saved
    assert places.dtype == torch.uint8 and places.shape == y.shape
    indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)[1]
    rows = torch.arange(5, device=DEVICE)[:, None] * 2 - 1
    columns = torch.arange(4, device=DEVICE)[None, :] * 2 - 1
    where = (rows + places // 3) * 7 + columns + places % 3
    assert torch.equal(where, indices)


def test_the_gradient_has_no_gradient():
    x = feature_map(2, 4, 6, 6)
    y = max_pool(x, 2).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


def test_what_can_be_taken():
    x = feature_map(2, 4, 9, 9).detach()
    assert can_pool(x, 3)
    assert can_pool(x, [3, 2], (2, 1), (1, 0), 1, False, False)
    assert can_pool(x, 3, dilation=(1, 1), ceil_mode=False)
    assert can_pool(x.bfloat16(), 3) and can_pool(x.half(), 3)
    assert can_pool(x, 9, 1) and not can_pool(x, 10, 1)  # as large as x
    assert can_pool(x, 11, 1, 1) and not can_pool(x, 12, 1, 1)
    for other in (x.contiguous(), x.double(), x.int(), x[0], x[:0], x[:, :2]):
        assert not can_pool(other, 3)
    for how in (
        dict(dilation=2), dict(dilation=(1, 2)), dict(ceil_mode=True),
        dict(return_indices=True), dict(padding=2), dict(padding=-1),
        dict(padding=(0, 2)), dict(stride=0), dict(stride=(1, 0)),
        dict(stride=(3,)), dict(stride=[]),
    ):  # fmt: skip
        assert not can_pool(x, 3, **how), how
    assert not can_pool(x, 0) and not can_pool(x, (3,))
    with use_form('reference'):
        assert not can_pool(x, 3)


def test_large_windows():
    """A place must fit in a byte, and kernels must compile in seconds."""
    x = feature_map(1, 1, 70, 70).detach()
    assert can_pool(x, (51, 5), 1) and not can_pool(x, 16, 1)
    assert can_pool(x, (1, 64), 1) and not can_pool(x, (1, 65), 1)
    assert can_pool(x, 8) and not can_pool(x, 9)
    assert can_pool(x, 1, 8) and not can_pool(x, 1, 9)


def test_the_last_place_of_the_largest_window():
    x = torch.arange(53.0 * 7).reshape(1, 1, 53, 7).to(DEVICE)
    compare(channels_last(x).requires_grad_(), ((51, 5), 1, 0))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a CUDA GPU')
def test_on_a_gpu_at_a_real_size():
    x = feature_map(64, 64, 112, 112, dtype=torch.bfloat16)
    compare(x.detach().relu().requires_grad_(), (3, 2, 1), wide=True)
