"""Batch norm behind a product, against autograd through the output."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmauxq.accelerate.kernels.product_norm import (
    product_norm,
    product_norm_backward,
    takes,
)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.mark.parametrize(
    'rows, inputs, outputs',
    [(500, 6, 24), (64, 64, 128), (130, 80, 70), (40, 256, 40), (3, 2, 5)],
)
def test_statistics_and_gradients(rows, inputs, outputs):
    torch.manual_seed(0)
    # values and weights that a bfloat16 holds
    x = torch.randint(0, 16, (rows, inputs)).double().requires_grad_()
    w = torch.randint(-8, 8, (outputs, inputs)).double().div(64)
    w = w.requires_grad_()
    weight = torch.rand(outputs, dtype=torch.double).requires_grad_()
    z = x @ w.t()
    g = torch.randn_like(z).bfloat16().double()
    running = torch.zeros(outputs), torch.ones(outputs)
    expected = [v.double() for v in running]
    F.batch_norm(
        z, *expected, weight, torch.zeros_like(weight), True, 0.1, 1e-5
    ).backward(g)
    dtype = torch.bfloat16 if DEVICE == 'cuda' else torch.float32
    running = [v.to(DEVICE) for v in running]
    gd, xd, wd = (v.detach().to(DEVICE, dtype) for v in (g, x, w))
    norm = product_norm(xd, wd, *running, 0.1, 1e-5)
    found = product_norm_backward(
        gd, gd.sum(0, dtype=torch.float32), xd, wd,
        weight.detach().float().to(DEVICE), norm,
    )  # fmt: skip
    assert_close(norm.mean.cpu().double(), z.mean(0), rtol=1e-5, atol=1e-5)
    rstd = (z.var(0, correction=0) + 1e-5).rsqrt()
    assert_close(norm.rstd.cpu().double(), rstd, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(running, expected, strict=True):
        assert_close(mine.cpu().double(), theirs, rtol=1e-4, atol=1e-5)
    close = 1e-2 if DEVICE == 'cuda' else 1e-4
    for mine, theirs in zip(found, (x, w, weight), strict=True):
        largest = theirs.grad.abs().max().item()
        assert_close(
            mine.cpu().double(), theirs.grad, rtol=0, atol=close * largest
        )


def test_takes_what_it_pays_for():
    assert takes(2, 256) and not takes(1, 16) and not takes(2, 257)
