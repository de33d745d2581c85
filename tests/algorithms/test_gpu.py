"""What needs a GPU: SyncBN, float16 scaling, device placement."""

import pytest
import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel, convert_sync_batchnorm
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import nn

from mmauxq.analysis import count_levels
from mmauxq.engine.recorded_ddp import RecordedDDP
from mmauxq.quantizers import named_quantizers
from tests.networks import batch, joint_qat

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason='needs a CUDA GPU'
    ),
]


def on_gpu(**settings):
    inputs, samples = batch(16)
    return (
        joint_qat(**settings).cuda(),
        dict(inputs=list(inputs), data_samples=samples),
    )


def test_same_losses_as_on_the_cpu():
    model, data = on_gpu()
    torch.backends.cudnn.allow_tf32 = False
    losses = model(**model.data_preprocessor(data, True), mode='loss')
    reference = joint_qat()
    expected = reference(
        **reference.data_preprocessor(data, True), mode='loss'
    )
    for name, value in losses.items():
        torch.testing.assert_close(
            value.cpu(), expected[name], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_amp_with_a_loss_scale(dtype):
    model, data = on_gpu()
    wrapper = AmpOptimWrapper(
        loss_scale='dynamic',
        dtype=dtype,
        optimizer=torch.optim.Adam(model.parameters(), 1e-3),
        accumulative_counts=2,
        clip_grad=dict(max_norm=1.0),
    )
    wrapper.initialize_count_status(model, 0, 40)
    losses = [
        model.train_step(data, wrapper)['student.loss'].item()
        for _ in range(40)
    ]
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    model.eval()
    inputs = model.data_preprocessor(data)['inputs']
    with torch.autocast('cuda', getattr(torch, dtype)):
        assert all(c.holds for c in count_levels(model, inputs))


# torch 2.11's own SyncBatchNorm asks for the autocast type in the old way; and
# the strides of a weight with one input channel, channels last, are ambiguous
@pytest.mark.filterwarnings('ignore:Grad strides do not match')
@pytest.mark.filterwarnings('ignore:torch.get_autocast_gpu_dtype')
def test_sync_batch_norm_and_ddp_without_a_search_for_unused_parameters(
    tmp_path,
):
    dist.init_process_group(
        'nccl', init_method=f'file://{tmp_path}/group', rank=0, world_size=1
    )
    try:
        model, data = on_gpu()
        model = convert_sync_batchnorm(model)
        norms = [
            type(m)
            for m in model.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        assert set(norms) == {nn.SyncBatchNorm}
        wrapped = MMDistributedDataParallel(model, device_ids=[0])
        wrapper = AmpOptimWrapper(
            optimizer=torch.optim.SGD(model.parameters(), 0.01)
        )
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for _ in range(2):
            wrapped.train_step(data, wrapper)
        assert all(q.calibrated for _, q in named_quantizers(model))
        assert all(
            not torch.equal(p, before[n])
            for n, p in model.named_parameters()
            if n.endswith('conv1.weight')
        )
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings('ignore:Grad strides do not match')
@pytest.mark.parametrize('counts', [1, 2])
@pytest.mark.parametrize('kind', [MMDistributedDataParallel, RecordedDDP])
def test_a_recorded_step_under_ddp(tmp_path, kind, counts):
    """DDP holds the nodes that add up gradients, made on another stream."""
    results = []
    for wrapped in (False, True):
        model, data = on_gpu(cuda_graph=True)
        if wrapped:
            dist.init_process_group(
                'nccl', init_method=f'file://{tmp_path}/group', rank=0,
                world_size=1,
            )  # fmt: skip
        try:
            trained = model
            if wrapped:
                trained = kind(model, device_ids=[0])
            wrapper = OptimWrapper(
                torch.optim.SGD(model.parameters(), 0.01),
                accumulative_counts=counts,
            )
            wrapper.initialize_count_status(model, 0, 6)
            with torch.backends.cudnn.flags(deterministic=True):
                for _ in range(6):
                    trained.train_step(data, wrapper)
            recorded = model.step.recorded
            assert recorded.recording.replays == 5
            assert recorded.averaged == (wrapped and kind is RecordedDDP)
            results.append({n: v.cpu() for n, v in model.state_dict().items()})
        finally:
            if wrapped:
                dist.destroy_process_group()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)
