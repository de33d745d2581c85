import torch

from benchmarks import ops


def test_all_quantizers_run():
    rows = list(ops.activations('cpu', 1, tiny=True))
    names = {row['name'] for row in rows if 'error' not in row}
    assert {'copy', 'mmauxq, reference', 'torch, learned step'} <= names
    assert 'mmrazor' in names
    fixed = [row for row in rows if row['name'] == 'torch, fixed step']
    assert len(fixed) == len(ops.SMALL)
    for row in fixed:
        assert row['forward_ms'] > 0 and row['backward_of_copy'] > 0


def test_all_weights_run():
    w = torch.randn(4, 3, requires_grad=True)
    s = torch.ones(4, requires_grad=True)
    (row,) = ops.weights([(w, s)], torch.bfloat16, 'cpu', 1)
    assert (row['weights'], row['values']) == (1, 12)
    assert row['eager_ms'] > 0
