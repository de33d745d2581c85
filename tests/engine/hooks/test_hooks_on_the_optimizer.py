"""What hooks that change the optimizer's steps on quantized weights share."""

import pytest
import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict

from mmauxq.errors import UsageError
from tests.networks import batch, joint_qat
from tests.running import make_runner, with_validation


@pytest.fixture(params=['OscillationFreezing', 'TransitionRateSchedule'])
def hook(request):
    return dict(type=f'mmauxq.{request.param}Hook')


def test_without_quantized_weights_it_says_so(tmp_path, hook):
    quantizers = dict(
        weight=dict(type='mmauxq.LSQ', bits=32),
        activation=dict(type='mmauxq.LSQ', bits=8),
    )
    runner = make_runner(
        tmp_path, model=joint_qat(quantizers=quantizers), custom_hooks=[hook]
    )
    name = hook['type'].removeprefix('mmauxq.')
    with pytest.raises(UsageError, match=f'{name}: expected a model wit'):
        runner.train()


def test_several_optimizers_are_refused(tmp_path, hook):
    model = joint_qat()
    wrapper = OptimWrapperDict(
        first=OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)),
        second=OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)),
    )
    runner = make_runner(
        tmp_path, model=model, optim_wrapper=wrapper, custom_hooks=[hook]
    )
    with pytest.raises(UsageError, match='of one optimizer, got one of 2$'):
        runner.train()


def test_a_test_needs_no_optimizer(tmp_path, hook):
    model = joint_qat()
    model.calibrate(batch(4)[0])
    runner = make_runner(
        tmp_path,
        model=model,
        custom_hooks=[hook],
        default_hooks=dict(checkpoint=None),
        **with_validation(),
    )
    assert 0 <= runner.val()['accuracy/top1'] <= 100
