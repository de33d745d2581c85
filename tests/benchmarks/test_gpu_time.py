"""Where the time of a GPU goes, on a trace made by hand."""

from benchmarks import gpu_time


def event(cat, name, ts, dur, tid=1, correlation=None):
    args = {} if correlation is None else dict(correlation=correlation)
    return dict(
        ph='X', cat=cat, name=name, ts=ts, dur=dur, pid=1, tid=tid, args=args
    )


def launch(ts, number, tid=1):
    return event('cuda_runtime', 'cudaLaunchKernelExC', ts, 5, tid, number)


def test_the_parts_of_a_step_add_up():
    nccl = 'ncclDevKernel_AllReduce_Sum_f32_RING_LL'
    events = [
        dict(ph='M', name='process_name', pid=1),
        event('user_annotation', 'ProfilerStep#1', 0, 2000),
        event('user_annotation', 'ProfilerStep#2', 2000, 2000),
        event('cpu_op', 'SyncBatchNorm', 100, 50),
        event('cpu_op', 'SyncBatchNormBackward', 100, 50, tid=2),
        # forward: statistics, nobody computes
        launch(120, 1),
        event('kernel', 'ncclDevKernel_AllGather_RING_LL', 1000, 300, 7, 1),
        # the same moment on another thread is no SyncBN
        launch(120, 2, tid=3),
        event('kernel', nccl, 2000, 1000, 8, 2),
        launch(160, 3, tid=2),  # after its end
        event('kernel', nccl, 3000, 400, 8, 3),
        event('kernel', 'gemm', 0, 1000, 7, 4),
        event('kernel', 'conv', 1500, 800, 7, 5),
        event('gpu_memcpy', 'Memcpy HtoD', 1600, 100, 9, 6),
        event('kernel', 'sgd', 3500, 500, 7, 7),
    ]
    found = gpu_time.split(events)
    assert found == dict(
        computing=1.15,  # 1000 + 800 + 500 of 4000, 2 steps
        sync_bn=0.15,
        all_reduce=0.55,  # 2300 to 3400
        idle=0.15,  # 1300 to 1500, 3400 to 3500
        sync_bn_total=0.15,
        all_reduce_total=0.7,
    )
    parts = ('computing', 'sync_bn', 'all_reduce', 'idle')
    assert abs(sum(found[part] for part in parts) - 2.0) < 1e-9


def test_a_trace_without_a_gpu():
    assert gpu_time.split([event('cpu_op', 'aten::mm', 0, 1)]) is None
