import torch
from torch import nn

from mmauxq.forward_hooks import forward_hooks


def test_hooks_see_each_pass_and_may_replace_the_output():
    network = nn.Sequential(nn.ReLU(), nn.ReLU())
    calls = []

    def hook(name, module, x, output):
        calls.append((name, module, x.item(), output.item()))
        return output + 1 if name == '0' else None

    with forward_hooks(network.named_children(), hook):
        assert network(torch.tensor(-3.0)) == 1
    assert calls == [('0', network[0], -3, 0), ('1', network[1], 1, 1)]
    assert network(torch.tensor(-3.0)) == 0 and len(calls) == 2
