"""The wrapper for several ranks, beside a stand-in for a recorded step."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from torch import nn

from mmauxq.engine.recorded_ddp import RecordedDDP
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')


class Replay(torch.autograd.Function):
    """Gives gradients as a recording does: past autograd, and all at once."""

    @staticmethod
    def forward(ctx, root, inputs, weight, average):
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.average = weight, average
        return (inputs @ weight.detach()).sum()

    @staticmethod
    def backward(ctx, grad):
        (inputs,) = ctx.saved_tensors
        flat = grad * inputs.sum(0)
        if ctx.weight.grad is not None:
            flat += ctx.weight.grad
        ctx.weight.grad = flat
        ctx.average([flat])
        return grad, None, None, None


class Model(nn.Module):
    """The sum of a matrix product, replayed or computed."""

    def __init__(self, replays):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.root = torch.zeros((), requires_grad=True)
        self.replays = iter(replays)
        self.step = SimpleNamespace(
            recorded=SimpleNamespace(average=None, averaged=False)
        )

    def forward(self, inputs):
        recorded = self.step.recorded
        if not next(self.replays) or recorded.average is None:
            return (inputs @ self.weight).sum()
        recorded.averaged = True
        return Replay.apply(self.root, inputs, self.weight, recorded.average)


def gradients(rank, kind, replays, accumulated, hook):
    """The gradient after each step, of a rank with inputs of its own."""
    model = Model(replays)
    wrapped = kind(model)
    if hook:
        wrapped.register_comm_hook(None, halve)
    found = []
    generator = torch.Generator().manual_seed(rank)
    for step in range(len(replays)):
        # whole numbers, whose sums have no rounding
        inputs = torch.randint(-9, 9, (5, 3), generator=generator).float()
        if step in accumulated:
            with wrapped.no_sync():
                wrapped(inputs).backward()
        else:
            wrapped(inputs).backward()
        found.append(model.weight.grad.tolist())
        if step not in accumulated:
            model.weight.grad = None
        assert model.step.recorded.average is None
    return found


def halve(state, bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer() / 2)
    return future


@pytest.mark.parametrize(
    'replays, accumulated, hook',
    [
        ([0, 1, 1, 1], [], False),
        ([0, 1, 0, 1, 1], [], False),  # a last batch that is not replayed
        ([0, 1, 1, 0, 1, 1], [0, 1, 4], False),
        ([0, 1, 1], [], True),
    ],
)
def test_gradients_are_those_of_ddp(replays, accumulated, hook):
    """To the bit, on two ranks, however steps alternate."""
    settings = replays, accumulated, hook
    expected = on_ranks(2, gradients, MMDistributedDataParallel, *settings)
    found = on_ranks(2, gradients, RecordedDDP, *settings)
    for result in expected + found:
        if isinstance(result, Exception):
            raise result
    assert found == expected
    if not accumulated and not hook:
        assert found[0] == found[1]
