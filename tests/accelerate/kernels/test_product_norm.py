"""Batch norm behind a product, against autograd through the output."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmauxq.accelerate.kernels.product_norm import (
    product_norm,
    product_norm_backward,
    products_of,
)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.mark.parametrize('shape', [(500, 6, 24), (64, 16, 32), (3, 1, 2)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_statistics_and_gradients(shape, dtype):
    rows, inputs, outputs = shape
    x = torch.rand(rows, inputs, dtype=dtype).requires_grad_()
    w = torch.randn(outputs, inputs, dtype=dtype).requires_grad_()
    weight = torch.rand(outputs, dtype=dtype).requires_grad_()
    bias = torch.randn(outputs, dtype=dtype).requires_grad_()
    z = x @ w.t()
    g = torch.randn_like(z)
    F.batch_norm(z, None, None, weight, bias, True, 0.1, 1e-5).backward(g)
    with torch.no_grad():
        norm = product_norm(products_of(x), w, 1e-5)
        found = product_norm_backward(g, g.sum(0), x, w, weight, norm)
    close = dict(rtol=1e-3, atol=1e-3)
    if dtype == torch.float64:
        close = dict(rtol=1e-9, atol=1e-10)
    assert_close(norm.mean, z.mean(0), **close)
    assert_close(norm.var, z.var(0, correction=0), **close)
    for mine, theirs in zip(found, (x, w, weight), strict=True):
        assert_close(mine, theirs.grad, **close)
