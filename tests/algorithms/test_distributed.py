"""Two processes through gloo, each with half the batch."""

import pytest
import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper

from mmauxq.accelerate import release_recordings
from mmauxq.engine.recorded_ddp import RecordedDDP
from mmauxq.errors import UsageError
from mmauxq.quantizers import named_quantizers
from tests.networks import AUX, batch, classifier, joint_qat
from tests.running import Samples, make_runner
from tests.support.ranks import free_port, on_ranks

pytestmark = pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
DSN = dict(type='mmauxq.IntermediateClassifiers')
# of all guidances, what has parameters, buffers, and no gradient
MANY = [
    AUX,
    dict(
        type='mmauxq.KnowledgeDistillation',
        features=dict(type='mmrazor.ATLoss', loss_weight=100.0),
        connector=dict(type='mmrazor.ConvModuleConnector'),
    ),
]


def numbers(tensors) -> dict:
    return {name: t.detach().numpy().copy() for name, t in tensors}


def train_steps(model, wrapped, count, part, rate=0.05):
    """Losses of some steps on a part of a batch of 16, always another."""
    model.train()  # norm_eval takes effect here
    optim = OptimWrapper(torch.optim.SGD(model.parameters(), rate))
    losses, scales = [], None
    for step in range(count):
        inputs, samples = batch(16, seed=step % 4)
        logs = wrapped.train_step(
            dict(inputs=list(inputs[part]), data_samples=samples[part]), optim
        )
        losses.append(float(logs['loss'].detach()))
        if scales is None:
            scales = numbers((n, q.step) for n, q in named_quantizers(model))
    return dict(
        losses=losses,
        scales=scales,
        parameters=numbers(model.named_parameters()),
        flags=numbers(
            (n, b)
            for n, b in model.named_buffers()
            if n.endswith(('calibrated', 'signed'))
        ),
        teachers=numbers(
            (n, t) for n, t in model.state_dict().items() if '.teacher.' in n
        ),
    )


def _train_half(rank, steps, settings):
    model = joint_qat(seed=rank, **settings)  # DDP makes the weights equal
    wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
    return train_steps(model, wrapped, steps, slice(8 * rank, 8 * rank + 8))


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert (first[name] == second[name]).all(), name


@pytest.mark.parametrize('steps, guidance', [(100, AUX), (5, MANY)])
def test_ranks_are_bit_equal(steps, guidance):
    """Without a search for unused parameters, from unequal beginnings."""
    settings = dict(guidance=guidance)
    first, second = on_ranks(2, _train_half, steps, settings)
    assert_equal(first['scales'], second['scales'])
    assert all((scale != 1).all() for scale in first['scales'].values())
    assert_equal(first['parameters'], second['parameters'])
    assert_equal(first['flags'], second['flags'])
    assert bool(first['teachers']) == (guidance is MANY)
    assert_equal(first['teachers'], second['teachers'])
    assert first['losses'] != second['losses']  # other data


def test_two_halves_are_one_whole():
    """Same updates as one process with the whole batch.

    Batch norm uses its stored statistics, since on the CPU there is no
    SyncBN. What remains is the order of sums in float32, which moves a value
    to the next level now and then: losses within 1e-4, weights within 1e-3
    where updates are above 3e-3.
    """
    settings = dict(
        architecture=classifier(norm_eval=True),
        guidance=DSN,
        quantizers=dict(
            weight=dict(type='mmauxq.LSQ', bits=8),
            activation=dict(type='mmauxq.LSQ', bits=8),
        ),
    )
    steps = 6
    first, second = on_ranks(2, _train_half, steps, settings)
    model = joint_qat(seed=0, **settings)
    whole = train_steps(model, model, steps, slice(0, 16))
    for a, b, together in zip(
        first['losses'], second['losses'], whole['losses'], strict=True
    ):
        assert (a + b) / 2 == pytest.approx(together, rel=1e-4)
    for name, scale in whole['scales'].items():
        assert first['scales'][name] == pytest.approx(scale, rel=1e-4), name
    start = numbers(joint_qat(seed=0, **settings).named_parameters())
    for name, value in whole['parameters'].items():
        assert first['parameters'][name] == pytest.approx(value, abs=1e-3), (
            name
        )
        if name.endswith('conv1.weight'):
            assert abs(value - start[name]).max() > 3e-3, name


def _uneven(rank, folder, round_up):
    loader = dict(
        batch_size=8,
        num_workers=0,
        dataset=Samples(17),
        sampler=dict(type='DefaultSampler', shuffle=False, round_up=round_up),
        collate_fn=dict(type='default_collate'),
    )
    runner = make_runner(
        folder,
        launcher='pytorch',
        train_dataloader=loader,
        cfg=dict(
            model_wrapper_cfg=dict(
                type='MMDistributedDataParallel',
                broadcast_buffers=False,
                device_ids=None,
            )
        ),
    )
    runner.train()
    return runner.iter


def test_uneven_last_batches_do_not_hang(tmp_path):
    # 9 images each, in batches of 8 and 1
    assert on_ranks(2, _uneven, tmp_path, True) == [2, 2]


def test_ranks_with_unequal_numbers_of_batches_are_refused(tmp_path):
    # 9 and 8 images: 2 batches and 1, and one rank would wait for ever
    for error in on_ranks(2, _uneven, tmp_path, False):
        assert isinstance(error, UsageError)
        assert 'on each rank, got 2 and 1' in str(error)
        assert 'round_up=True' in str(error)


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason='needs two CUDA GPUs'
)
def test_two_gpus_through_nccl_are_one_process(tmp_path):
    """SyncBN: two halves through NCCL are one whole batch; ranks equal."""
    import torch.multiprocessing as mp

    mp.spawn(_train_on_gpu, (tmp_path, free_port()), nprocs=2)
    first, second, whole = (
        torch.load(tmp_path / f'{name}.pt', weights_only=True)
        for name in ('0', '1', 'whole')
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(
            value, whole[name], rtol=1e-3, atol=1e-4, msg=name
        )


def _train_on_gpu(rank, folder, port):
    from mmengine.model import convert_sync_batchnorm

    torch.cuda.set_device(rank)
    torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(
        'nccl',
        init_method=f'tcp://127.0.0.1:{port}',
        rank=rank,
        world_size=2,
    )
    model = convert_sync_batchnorm(joint_qat(seed=rank).cuda())
    wrapped = MMDistributedDataParallel(
        model, device_ids=[rank], broadcast_buffers=False
    )
    train_steps_on_gpu(model, wrapped, slice(8 * rank, 8 * rank + 8))
    torch.save(
        {n: p.detach().cpu() for n, p in model.named_parameters()},
        folder / f'{rank}.pt',
    )
    dist.barrier()
    release_recordings()
    dist.destroy_process_group()
    if rank == 0:
        model = joint_qat(seed=0).cuda()
        train_steps_on_gpu(model, model, slice(0, 16))
        torch.save(
            {n: p.detach().cpu() for n, p in model.named_parameters()},
            folder / 'whole.pt',
        )


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason='needs two CUDA GPUs'
)
def test_recorded_steps_of_two_gpus():
    """Exchanged at once, gradients are those of DDP; two ranks have one sum,
    in whichever order, so all is equal to the bit."""
    found = [
        on_ranks(2, _train_recorded, kind, counts, cuda=True)
        for counts in (1, 2)
        for kind in (MMDistributedDataParallel, RecordedDDP)
    ]
    for result in (rank for ranks in found for rank in ranks):
        if isinstance(result, Exception):
            raise result
    for ddp, recorded in (found[:2], found[2:]):
        assert not ddp[0]['averaged'] and recorded[0]['averaged']
        assert ddp[0]['losses'] != ddp[1]['losses']
        for rank in (0, 1):
            assert recorded[rank]['losses'] == ddp[rank]['losses']
            assert_equal(recorded[rank]['parameters'], ddp[0]['parameters'])


def _train_recorded(rank, kind, counts):
    model = joint_qat(seed=rank, cuda_graph=True).cuda()
    wrapped = kind(model, device_ids=[rank], broadcast_buffers=False)
    optim = OptimWrapper(
        torch.optim.SGD(model.parameters(), 0.01), accumulative_counts=counts
    )
    optim.initialize_count_status(model, 0, 8)
    losses = []
    with torch.backends.cudnn.flags(deterministic=True):
        for step in range(8):
            inputs, samples = batch(8, seed=2 * step + rank)
            data = dict(inputs=list(inputs), data_samples=samples)
            losses.append(float(wrapped.train_step(data, optim)['loss']))
    return dict(
        losses=losses,
        averaged=model.step.recorded.averaged,
        parameters={
            n: p.detach().cpu().numpy() for n, p in model.named_parameters()
        },
    )


def train_steps_on_gpu(model, wrapped, part):
    optim = OptimWrapper(torch.optim.SGD(model.parameters(), 0.01))
    for step in range(3):
        inputs, samples = batch(16, seed=step)
        wrapped.train_step(
            dict(inputs=list(inputs[part]), data_samples=samples[part]), optim
        )
