"""The kernels of the learned step against float64, and against the reference.

Without a GPU they run in Triton's interpreter, which rounds to bfloat16 by
cutting off and has no fused multiply-add: exactness to the last bit is then
checked in float32 and float16, on seeded numbers.
"""

import logging

import pytest
import torch
from torch.testing import assert_close

from mmauxq.accelerate.kernels import dispatch
from mmauxq.accelerate.kernels import lsq as lsq_kernels
from mmauxq.accelerate.kernels.dispatch import (
    fall_back,
    is_dense,
    use_form,
    wants_kernel,
)
from mmauxq.accelerate.kernels.tiles import is_wide
from mmauxq.quantizers.functional import learned_step_quantize

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
RANGES = [(0, 15), (-8, 7), (0, 3), (-2, 1), (-128, 127)]
# shape of x, channels-last, shape of step: tiles are not filled by any
LAYOUTS = [
    ((3, 5, 7, 9), False, ()),
    ((3, 5, 7, 9), True, (1,)),
    ((3, 5, 7, 9), True, (1, 5, 1, 1)),
    ((3, 5, 7, 9), False, (1, 5, 1, 1)),
    ((6, 5, 3, 3), True, (6, 1, 1, 1)),
    ((2, 9, 131), False, (131,)),
    ((3, 1, 1, 1), False, (1, 1, 1, 1)),
    ((5000,), False, ()),
]


def case(shape, channels_last, step_shape, qmin, qmax, dtype, with_offset):
    x = (torch.randn(shape) * 2).to(DEVICE, dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    step = (torch.rand(step_shape) + 0.2).to(DEVICE) * 8 / (qmax - qmin)
    inputs = [x, step]
    if with_offset:
        inputs.append(torch.randn(step_shape).to(DEVICE))
    return [t.requires_grad_() for t in inputs]


def results(inputs, qmin, qmax, form, upstream=None):
    x, step, *offset = inputs
    with use_form(form):
        y = learned_step_quantize(
            x, step, qmin, qmax, *offset, grad_scale=0.37
        )
        if upstream is None:
            torch.manual_seed(1)
            upstream = torch.randn(y.shape).to(y)
        return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


@pytest.mark.parametrize('with_offset', [False, True])
@pytest.mark.parametrize('shape, channels_last, step_shape', LAYOUTS)
def test_agrees_with_float64(
    shape, channels_last, step_shape, with_offset, poisoned
):
    for i, (qmin, qmax) in enumerate(RANGES):
        torch.manual_seed(i)
        inputs = case(
            shape, channels_last, step_shape, qmin, qmax, torch.float32,
            with_offset,
        )  # fmt: skip
        found = results(inputs, qmin, qmax, 'kernel')
        wide = [t.detach().double().requires_grad_() for t in inputs]
        expected = results(wide, qmin, qmax, 'reference')
        assert found[0].stride() == inputs[0].stride()
        assert found[1].stride() == inputs[0].stride()
        for ours, theirs, given in zip(
            found[1:], expected[1:], inputs, strict=True
        ):
            assert (ours.shape, ours.dtype) == (given.shape, given.dtype)
            assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
        assert_close(found[0].double(), expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float16, torch.bfloat16]
)
@pytest.mark.parametrize('with_offset', [False, True])
@pytest.mark.parametrize('shape, channels_last, step_shape', LAYOUTS)
def test_agrees_with_the_reference_to_the_bit(
    shape, channels_last, step_shape, with_offset, dtype
):
    inputs = case(shape, channels_last, step_shape, -4, 3, dtype, with_offset)
    found = results(inputs, -4, 3, 'kernel')
    expected = results(inputs, -4, 3, 'reference')
    if dtype == torch.bfloat16 and DEVICE == 'cpu':
        wide = [t.detach().float().requires_grad_() for t in inputs]
        bits = results(wide, -4, 3, 'reference')[0].view(torch.int32)
        # what the interpreter makes of float32
        expected[0] = (bits & -65536).view(torch.float32).to(dtype)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_ties_borders_and_what_is_no_number():
    v = [-3, -2, -1.75, -1.5, -0.5, 0, 0.5, 0.75, 1, 2, 1e30]
    x = torch.tensor([*v, torch.inf, -torch.inf, torch.nan], device=DEVICE)
    inputs = [(x * 0.5).requires_grad_(), torch.tensor(0.5, device=DEVICE)]
    inputs[1].requires_grad_()
    ones = torch.ones_like(x)
    y, grad_x, grad_step = results(inputs, -2, 1, 'kernel', ones)
    codes = [-2, -2, -2, -2, 0, 0, 0, 1, 1, 1, 1, 1, -2]
    assert (y[:-1] * 2).tolist() == codes
    assert y[-1].isnan() and grad_step.isnan()
    inside = [0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert grad_x.tolist() == inside


def test_sums_are_the_same_each_time():
    inputs = case((64, 130, 5), False, (), 0, 15, torch.float32, True)
    first = results(inputs, 0, 15, 'kernel')
    again = results(inputs, 0, 15, 'kernel')
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_gradient_of_another_layout():
    """An expanded gradient, and one that is not channels-last."""
    inputs = case((2, 6, 5, 5), True, (), 0, 15, torch.float32, False)
    for upstream in (
        torch.ones(1, device=DEVICE).expand(2, 6, 5, 5),
        torch.randn(2, 6, 5, 5, device=DEVICE),
    ):
        found = results(inputs, 0, 15, 'kernel', upstream)
        expected = results(inputs, 0, 15, 'reference', upstream)
        assert torch.equal(found[1], expected[1])
        assert_close(found[2], expected[2])


def test_large_tensors_count_in_64_bits():
    x = torch.empty(2**16, 2**16, device='meta')
    small = torch.empty(2**15, 2**15, device='meta')
    assert is_wide(x)
    assert not is_wide(small)


@pytest.mark.parametrize('with_offset', [False, True])
@pytest.mark.parametrize('step_shape', [(), (1, 6, 1, 1)])
def test_is_one_operator_of_torch(step_shape, with_offset):
    inputs = case((2, 6, 3, 3), True, step_shape, 0, 15, torch.float32, False)
    offset = torch.zeros_like(inputs[1]).requires_grad_()
    torch.library.opcheck(
        torch.ops.mmauxq.learned_step_quantize,
        (*inputs, offset if with_offset else None, 0, 15, 0.5),
    )


def test_the_operator_computes_also_without_triton(monkeypatch):
    monkeypatch.setattr(lsq_kernels, 'runs_triton', lambda x: False)
    inputs = case((2, 6, 3, 3), True, (), 0, 15, torch.float32, True)
    y = torch.ops.mmauxq.learned_step_quantize(*inputs, 0, 15, 0.37)
    torch.manual_seed(1)
    upstream = torch.randn(y.shape).to(y)
    found = [y, *torch.autograd.grad(y, inputs, upstream)]
    expected = results(inputs, 0, 15, 'reference')
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)


# torch 2.11, of its own doing
@pytest.mark.filterwarnings('ignore:.*should not be instantiated')
def test_compiled_code_holds_the_operator_or_the_reference():
    def count(form):
        nodes = []

        def backend(module, inputs):
            nodes.extend(str(node.target) for node in module.graph.nodes)
            return module

        torch._dynamo.reset()
        with use_form(form):
            torch.compile(
                lambda x, step: learned_step_quantize(x, step, 0, 15),
                backend=backend,
                fullgraph=True,
            )(torch.randn(3, 4), torch.tensor(0.5))
        return sum('mmauxq' in node for node in nodes)

    assert count('kernel') == 1
    assert count('auto') == 0


@pytest.mark.parametrize('offset', [None, torch.full((), -1.25)])
def test_export_holds_the_operator(offset):
    class Net(torch.nn.Module):
        def forward(self, x):
            return learned_step_quantize(x, torch.full((), 0.5), 0, 15, offset)

    x = torch.randn(3, 4)
    with use_form('kernel'):
        program = torch.export.export(Net(), (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert 'mmauxq.learned_step_quantize.default' in targets
    expected = learned_step_quantize(x, torch.full((), 0.5), 0, 15, offset)
    assert torch.equal(program.module()(x), expected)


@pytest.mark.parametrize(
    'x, step, reason',
    [
        (torch.randn(3, 4).double(), torch.ones(1), 'dtype torch.float64'),
        (torch.randn(3, 4), torch.ones(3, 4), 'several axes'),
        (torch.randn(3, 8)[:, ::2], torch.ones(1), 'gaps'),
    ],
)
def test_falls_back_with_one_log_line(x, step, reason, caplog):
    fall_back.cache_clear()
    with caplog.at_level(logging.WARNING, 'mmauxq'), use_form('kernel'):
        y = learned_step_quantize(x, step, 0, 15)
        learned_step_quantize(x, step, 0, 15)
    assert [reason in r.getMessage() for r in caplog.records] == [True]
    assert torch.equal(y, learned_step_quantize(x, step, 0, 15))


@pytest.mark.parametrize(
    'offset', [torch.zeros(4), torch.zeros(()), torch.zeros(1).half()]
)
def test_a_step_and_an_offset_that_are_not_alike(offset, caplog):
    x = torch.randn(3, 4)
    fall_back.cache_clear()
    with caplog.at_level(logging.WARNING, 'mmauxq'):
        assert lsq_kernels.can_run(x, torch.ones(1), torch.zeros(1))
        assert not caplog.records
        assert not lsq_kernels.can_run(x, torch.ones(1), offset)
    assert [r.getMessage() for r in caplog.records] == [
        'mmauxq: the definition runs instead of a kernel: step and offset '
        'that are not alike'
    ]


@pytest.mark.parametrize(
    'value, installed, expected',
    [
        (None, True, False),
        ('', True, False),
        ('0', True, False),
        ('1', True, True),
        ('1', False, False),
    ],
)
def test_the_cpu_needs_the_interpreter(
    value, installed, expected, monkeypatch
):
    monkeypatch.setattr(dispatch, 'has_triton', lambda: installed)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    if value is not None:
        monkeypatch.setenv('TRITON_INTERPRET', value)
    assert dispatch.runs_triton(torch.ones(1)) == expected


def test_nothing_to_quantize():
    x = torch.randn(0, 4, requires_grad=True)
    with use_form('kernel'):
        y = learned_step_quantize(x, torch.ones(1), 0, 15)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 4)


def test_automatic_choice_on_the_cpu_is_the_reference():
    assert not wants_kernel(torch.ones(1))
    with use_form('auto'):
        assert not wants_kernel(torch.ones(1))
        y = learned_step_quantize(torch.ones(1), torch.ones(1), 0, 3)
    assert y.item() == 1
    with use_form('kernel'):
        assert wants_kernel(torch.ones(1))
    with pytest.raises(ValueError, match='auto.*reference.*kernel'):
        with use_form('fast'):
            pass


def test_dense_layouts():
    x = torch.empty(2, 3, 4, 5)
    assert is_dense(x) and is_dense(x.permute(2, 0, 3, 1))
    assert is_dense(torch.empty(2, 1, 4).transpose(0, 1))
    assert not is_dense(x[:, :2]) and not is_dense(x[..., ::2])
    assert not is_dense(torch.empty(3, 1).expand(3, 4))


@pytest.mark.parametrize(
    'change, error, message',
    [
        (
            dict(x=torch.ones(3).int()),
            TypeError,
            'x: .* got torch.int32',
        ),
        (
            dict(step=torch.ones(2)),
            ValueError,
            r'step: .* got \(2,\)',
        ),
        (
            dict(step=torch.ones(3, device='meta')),
            ValueError,
            'step: expected the device of x, cpu, got meta',
        ),
        (
            dict(step=torch.zeros(1)),
            ValueError,
            'positive values, got 0',
        ),
        (
            dict(step=torch.tensor(torch.nan)),
            ValueError,
            'step: expected positive values, got nan',
        ),
        (
            dict(offset=torch.ones(4)),
            ValueError,
            r'offset: .* got \(4,\)',
        ),
        (dict(qmin=1), ValueError, 'qmin=1'),
        (dict(qmax=0), ValueError, 'qmax=0'),
    ],
)
@pytest.mark.parametrize('form', ['reference', 'kernel'])
def test_wrong_use_is_one_line_on_the_host(form, change, error, message):
    given = dict(x=torch.ones(3), step=torch.ones(1), qmin=0, qmax=15)
    with use_form(form), pytest.raises(error, match=message) as caught:
        learned_step_quantize(**{**given, **change})
    assert '\n' not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a CUDA GPU')
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
@pytest.mark.parametrize('channels', [None, 1, -1])
def test_on_a_gpu_at_real_sizes(dtype, channels):
    """Values and gradients of x to the bit; the sums against float64."""
    x = torch.randn(32, 65, 57, 59, device='cuda').to(dtype)
    if channels == -1:
        x = x.contiguous(memory_format=torch.channels_last)
    shape = () if channels is None else (1, 65, 1, 1)
    step = (torch.rand(shape, device='cuda') + 0.1).requires_grad_()
    inputs = [x.requires_grad_(), step]
    upstream = torch.randn_like(x)
    found = results(inputs, 0, 15, 'kernel', upstream)
    expected = results(inputs, 0, 15, 'reference', upstream)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    # codes as of float32, where 64 bits round a few of them the other way
    v = x.detach().float() / step.detach()
    slope = torch.where((v > 0) & (v < 15), v.round() - v, v.clamp(0, 15))
    exact = (slope.double() * upstream.double() * 0.37).sum_to_size(step.shape)
    assert_close(found[2].double(), exact, rtol=1e-4, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a CUDA GPU')
def test_on_a_gpu_more_elements_than_32_bits_count():
    n = 2**31 + 5
    x = torch.empty(n, dtype=torch.bfloat16, device='cuda').normal_()
    step = torch.tensor(0.5, device='cuda')
    y = learned_step_quantize(x, step, 0, 15)
    for part in (slice(0, 9), slice(n - 9, n)):
        with use_form('reference'):
            expected = learned_step_quantize(x[part], step, 0, 15)
        assert torch.equal(y[part], expected)


def test_a_mode_that_looks_on_sees_all_arguments():
    class Look(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is learned_step_quantize:
                seen.append((args, kwargs))
            return func(*args, **(kwargs or {}))

    seen: list = []
    x, step, offset = torch.randn(4), torch.ones(1), torch.ones(1)
    with Look():
        y = learned_step_quantize(x, step, 0, 3, offset, 0.5)
    assert torch.equal(y, learned_step_quantize(x, step, 0, 3, offset))
    ((args, kwargs),) = seen
    assert args[0] is x and args[1] is step and args[2:] == (0, 3)
    assert kwargs['offset'] is offset and kwargs['grad_scale'] == 0.5


def test_the_op_is_seen_whole_by_subclasses_of_tensors():
    class Looking(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    seen: list = []
    x = torch.randn(4).as_subclass(Looking)
    learned_step_quantize(x, torch.ones(1), 0, 3)
    assert seen[0] is learned_step_quantize
