"""Mixed precision without a GPU."""

import pytest
import torch
from torch import nn

from mmauxq.engine.optimizers import CPUAmpOptimWrapper
from mmauxq.errors import UsageError


def wrapped(parameter, **kwargs):
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    return CPUAmpOptimWrapper(optimizer=optimizer, **kwargs)


@pytest.mark.parametrize(
    'kwargs, dtype, scale',
    [
        ({}, torch.bfloat16, None),
        (dict(loss_scale=8), torch.bfloat16, 8.0),
        (dict(dtype='float16'), torch.float16, 2.0**16),
        (dict(dtype='float16', loss_scale=4.0), torch.float16, 4.0),
        (
            dict(dtype='float16', loss_scale=dict(init_scale=2.0)),
            torch.float16,
            2.0,
        ),
    ],
)
def test_products_are_in_half_precision_and_losses_scaled(
    kwargs, dtype, scale
):
    layer = nn.Linear(3, 2, bias=False)
    weight = layer.weight
    wrapper = wrapped(weight, **kwargs)
    x, before = torch.rand(4, 3), weight.detach().clone()
    with wrapper.optim_context(layer):
        y = layer(x)
    assert y.dtype == dtype and layer(x).dtype == torch.float32
    seen = []
    weight.register_hook(seen.append)
    wrapper.update_params(y.float().sum() / 64)  # 2**16 is beyond float16
    expected = x.to(dtype).float().sum(0).expand(2, 3) / 64
    half = dict(rtol=0.01, atol=1e-5)
    torch.testing.assert_close(seen[0], expected * (scale or 1.0), **half)
    torch.testing.assert_close(before - weight, expected, **half)


def test_a_step_that_overflows_is_left_out():
    weight = nn.Parameter(torch.ones(1))
    wrapper = wrapped(weight, dtype='float16')
    wrapper.update_params((weight * torch.inf).sum())
    assert weight.item() == 1 and wrapper.loss_scaler.get_scale() == 2.0**15
    again = wrapped(weight, dtype='float16')
    again.load_state_dict(wrapper.state_dict())
    assert again.loss_scaler.get_scale() == 2.0**15


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(dtype='float64'), "of bfloat16, float16, got 'float64'"),
        (dict(loss_scale='static'), "loss_scale: expected .*, got 'static'"),
        (dict(loss_scale=0), 'loss_scale: expected .*, got 0'),
        (dict(loss_scale=True), 'loss_scale: expected .*, got True'),
    ],
)
def test_other_settings_are_one_line(kwargs, message):
    with pytest.raises(UsageError, match=message):
        wrapped(nn.Parameter(torch.ones(1)), **kwargs)
