"""Two processes through gloo, each with half the batch."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper

from mmauxq.quantizers import named_quantizers
from tests.networks import AUX, batch, joint_qat

# of all guidances, what has parameters, buffers, and no gradient
GUIDANCE = [
    AUX,
    dict(
        type='mmauxq.KnowledgeDistillation',
        features=dict(type='mmrazor.ATLoss', loss_weight=100.0),
        connector=dict(type='mmrazor.ConvModuleConnector'),
    ),
]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def _train(rank: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'tcp://127.0.0.1:{port}',
        rank=rank,
        world_size=2,
    )
    # DDP makes the weights equal
    model = joint_qat(seed=rank, guidance=GUIDANCE)
    wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
    optim = OptimWrapper(torch.optim.SGD(model.parameters(), 0.05))
    inputs, samples = batch(16)
    part = slice(8 * rank, 8 * rank + 8)
    scales = None
    for _ in range(3):
        wrapped.train_step(
            dict(inputs=list(inputs[part]), data_samples=samples[part]), optim
        )
        if scales is None:
            scales = {n: q.step.detach() for n, q in named_quantizers(model)}
    state = {
        name: value.detach().numpy()
        for name, value in model.state_dict().items()
        if name in dict(model.named_parameters()) or '.teacher.' in name
    }
    queue.put((rank, {n: s.numpy() for n, s in scales.items()}, state))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_two_ranks_stay_equal_without_a_search_for_unused_parameters():
    context = mp.get_context('spawn')
    queue = context.Queue()
    port = _free_port()
    ranks = [
        context.Process(target=_train, args=(rank, port, queue))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    results = sorted(
        (queue.get(timeout=120) for _ in ranks), key=lambda r: r[0]
    )
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    (_, scales, weights), (_, other_scales, other_weights) = results
    assert scales.keys() == other_scales.keys()
    for name in scales:
        assert (scales[name] == other_scales[name]).all(), name
        assert (scales[name] != 1).all(), name
    for name in weights:
        assert (weights[name] == other_weights[name]).all(), name
