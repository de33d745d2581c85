"""The fused kernels against float64, in Triton's interpreter or on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

pytest.importorskip('triton')
from benchmarks import fused_products as fused  # noqa: E402
from benchmarks import fusions, results  # noqa: E402
from benchmarks.compile_ahead import MOST_SHARED, Compiler  # noqa: E402
from mmauxq.accelerate.kernels.norm import BatchNorm  # noqa: E402

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Triton's interpreter rounds to bfloat16 by cutting off
HALF = torch.float16 if DEVICE == 'cpu' else torch.bfloat16
QMIN, QMAX = -3, 12
SHAPES = [
    fused.Shape(3, 20, 37, 5, 7),  # nothing divides anything
    fused.Shape(2, 33, 18, 7, 5, stride=2),
    fused.Shape(2, 32, 64, 8, 8),  # everything divides everything
    fused.Shape(1, 64, 32, 16, 16, stride=2),
]
# the sum of products in one go, and in several
CASES = [
    (HALF, fused.Config(16, 32, 64, 4, 2)),
    (torch.float32, fused.Config(32, 16, 16, 4, 2, programs=4)),
]
# each case meets shapes of both strides, that divide something and nothing
EACH_ONCE = [
    (shape, config, dtype)
    for shape, (dtype, config) in zip(
        SHAPES, [*CASES, *reversed(CASES)], strict=True
    )
]


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def feature_map(batch, channels, size, dtype=torch.float32):
    x = torch.randn(batch, channels, *size, device=DEVICE)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def per_channel(channels):
    norm = BatchNorm(
        torch.randn(channels), torch.rand(channels) + 0.5,
        torch.rand(channels) + 0.5, torch.randn(channels),
    )  # fmt: skip
    for name, value in vars(norm).items():
        setattr(norm, name, value.to(DEVICE))
    return norm


def codes_of(shape, dtype):
    size = shape.height, shape.width
    codes = torch.randint(
        0, QMAX - QMIN + 1, (shape.batch, shape.inputs, *size), device=DEVICE
    )
    codes = codes.to(torch.uint8)
    codes = codes.contiguous(memory_format=torch.channels_last)
    step = torch.tensor([0.13], device=DEVICE)
    return codes, step, ((codes.float() + QMIN) * step).to(dtype)


def weight_of(shape, dtype):
    w = torch.randn(shape.outputs, shape.inputs, 1, 1, device=DEVICE) / 4
    return w.to(dtype)


def close(found, expected, dtype, size=None):
    """To a part of the largest value, or of the sizes that were summed."""
    part = 2e-6 if dtype == torch.float32 else 2e-3
    expected = expected.to(found.device)
    scale = expected.abs().max() if size is None else size.max()
    error = (found.double() - expected).abs().max()
    assert error <= 4 * part * scale, (error, scale)


def wide(norm):
    return [
        p.double().reshape(1, -1, 1, 1)
        for p in (norm.mean, norm.rstd, norm.weight, norm.bias)
    ]


@pytest.mark.parametrize('shape, config, dtype', EACH_ONCE)
@pytest.mark.parametrize('as_codes', [True, False])
def test_product_and_statistics(shape, config, dtype, as_codes):
    codes, step, q = codes_of(shape, dtype)
    w = weight_of(shape, dtype)
    running = torch.randn(2, shape.outputs, device=DEVICE).abs()
    before = running.double()
    run = fused.product(
        shape, config, codes if as_codes else q, step, w, running, QMIN
    )
    run()
    expected = F.conv2d(q.double(), w.double(), stride=shape.stride)
    z = run.out['z']
    assert z.stride() == expected.stride() or z.is_contiguous(
        memory_format=torch.channels_last
    )
    close(z, expected, dtype)
    rows = z.double().transpose(0, 1).flatten(1)
    assert_close(run.out['mean'].double(), rows.mean(1), rtol=0, atol=1e-6)
    var = rows.var(1, correction=0)
    rstd = (var + fused.EPS) ** -0.5
    assert_close(run.out['rstd'].double(), rstd, rtol=1e-5, atol=0)
    momentum = fused.MOMENTUM
    assert_close(
        running[0].double(),
        torch.lerp(before[0], rows.mean(1), momentum), rtol=0, atol=1e-6,
    )  # fmt: skip
    assert_close(
        running[1].double(),
        torch.lerp(before[1], rows.var(1), momentum), rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_variance_far_from_zero():
    """A mean of 1,000 deviations does not swallow the variance."""
    shape = fused.Shape(4, 16, 16, 9, 9)
    w = torch.eye(16, device=DEVICE).reshape(16, 16, 1, 1)
    q = feature_map(4, 16, (9, 9)) + 1000
    step = torch.ones(1, device=DEVICE)
    running = torch.zeros(2, 16, device=DEVICE)
    run = fused.product(shape, CASES[1][1], q, step, w, running)
    run()
    rows = q.double().transpose(0, 1).flatten(1)
    rstd = (rows.var(1, correction=0) + fused.EPS) ** -0.5
    assert_close(run.out['rstd'].double(), rstd, rtol=1e-4, atol=0)


@pytest.mark.parametrize('dtype', [torch.float32, HALF])
@pytest.mark.parametrize('identity', [False, True])
def test_codes_of_the_normalised(identity, dtype):
    z = feature_map(3, 20, (5, 7), dtype)
    other = feature_map(3, 20, (5, 7), dtype) if identity else None
    norm, step = per_channel(20), torch.tensor([0.3], device=DEVICE)
    run = fused.normalised_codes(z, norm, other, step, QMIN, QMAX)
    run()
    mean, rstd, weight, bias = wide(norm)
    x = ((z.double() - mean) * (rstd * weight) + bias).to(dtype)
    x = x if other is None else x + other
    x = x.relu()
    codes = (x.float() / step).round().clamp(QMIN, QMAX) - QMIN
    # a value on the border between two codes may round to either
    wrong = run.out['codes'].float() != codes
    assert wrong.float().mean() < 0.01
    assert (run.out['codes'].float() - codes).abs().max() <= 1
    if identity:
        close(run.out['x'], x.double(), dtype)


def masked(x, grad, step):
    """Gradients of the quantizer's input, and of the step, element by element,
    float64; ``x`` as it is stored."""
    v = (x.float() / step).double()
    inside = (v > QMIN) & (v < QMAX)
    slope = torch.where(inside, v.round() - v, v.clamp(QMIN, QMAX))
    return torch.where(inside, grad, 0), slope * grad


def backward_case(shape, dtype, front):
    """The gradient of a convolution's output in float64, and what the kernels
    are given to make it."""
    grad = feature_map(shape.batch, shape.outputs, shape.out_size, dtype)
    if front == 'PLAIN':
        return fused.After(grad), grad.double()
    z = feature_map(shape.batch, shape.outputs, shape.out_size, dtype)
    norm = per_channel(shape.outputs)
    sums = torch.randn(3, shape.outputs, device=DEVICE)
    step = torch.tensor([0.21], device=DEVICE)
    after = fused.After(
        grad, z, norm, sums, step if front == 'NORM_MASK' else None
    )
    mean, rstd, weight, bias = wide(norm)
    g = grad.double()
    if front == 'NORM_MASK':
        x = ((z.double() - mean) * (rstd * weight) + bias).to(dtype).relu()
        g, _ = masked(x, g, step)
        g = torch.where(x > 0, g, 0)
    of_bias, of_weight = sums[:2].double().reshape(2, 1, -1, 1, 1)
    hat = (z.double() - mean) * rstd
    g = rstd * weight * (g - (of_bias + hat * of_weight) / shape.rows)
    return after, g.to(dtype).double()


def before_case(shape, dtype, kind):
    size = shape.height, shape.width
    maps = [feature_map(shape.batch, shape.inputs, size, dtype) for _ in 'xzo']
    x, z, other = maps
    step = torch.tensor([0.17], device=DEVICE)
    if kind == 'NOTHING':
        return fused.Before()
    if kind == 'QUANTIZE':
        return fused.Before(kind, step, x)
    norm = per_channel(shape.inputs)
    if kind == 'NORM_QUANTIZE':
        return fused.Before(kind, step, None, z, norm)
    return fused.Before(kind, step, x.relu(), z, norm, other)


FRONTS = ['PLAIN', 'NORM', 'NORM_MASK']
KINDS = ['NOTHING', 'QUANTIZE', 'NORM_QUANTIZE', 'SUM_QUANTIZE']


@pytest.mark.parametrize('shape, config, dtype', EACH_ONCE)
@pytest.mark.parametrize('front', FRONTS)
@pytest.mark.parametrize('kind', KINDS)
def test_input_gradient(shape, config, dtype, front, kind):
    if kind == 'SUM_QUANTIZE' and shape.stride == 2:
        with pytest.raises(ValueError, match='stride 1, got 2'):
            fused.input_grad(
                shape, config, weight_of(shape, dtype),
                fused.After(torch.empty(1)), fused.Before(kind), False, 0, 1,
            )  # fmt: skip
        return
    after, grad_z = backward_case(shape, dtype, front)
    before = before_case(shape, dtype, kind)
    w = weight_of(shape, dtype)
    store = front == 'NORM'
    run = fused.input_grad(shape, config, w, after, before, store, QMIN, QMAX)
    run()
    if store:
        close(run.out['grad_z'], grad_z, dtype)
    pixels = shape.height, shape.width
    q = torch.zeros(
        shape.batch, shape.inputs, *pixels, dtype=torch.double, device=DEVICE,
        requires_grad=True,
    )  # fmt: skip
    y = F.conv2d(q, w.double(), stride=shape.stride)
    (g,) = torch.autograd.grad(y, q, grad_z)
    x, in_step = before.x, None
    if kind == 'NORM_QUANTIZE':
        mean, rstd, weight, bias = wide(before.norm)
        x = (before.z.double() - mean) * (rstd * weight) + bias
        x = x.to(dtype).relu()
    if kind != 'NOTHING':
        g, in_step = masked(x, g, before.step)
        assert run.out['sums'].shape[0] == (1 if kind == 'QUANTIZE' else 3)
        found = run.out['sums'][-1]
        size = in_step.abs().sum((0, 2, 3))
        close(found, in_step.sum((0, 2, 3)), dtype, size)
    if kind == 'SUM_QUANTIZE':
        g = g + before.other.double()
    if kind in KINDS[2:]:
        g = torch.where(x > 0, g, 0)
        hat = (before.z.double() - wide(before.norm)[0]) * wide(before.norm)[1]
        for found, each in zip(run.out['sums'], (g, g * hat), strict=False):
            size = each.abs().sum((0, 2, 3))
            close(found, each.sum((0, 2, 3)), dtype, size)
    close(run.out['grad'], g, dtype)


@pytest.mark.parametrize('shape, config, dtype', EACH_ONCE)
@pytest.mark.parametrize('front', FRONTS)
@pytest.mark.parametrize('as_codes', [True, False])
def test_weight_gradient(shape, config, dtype, front, as_codes):
    after, grad_z = backward_case(shape, dtype, front)
    codes, step, q = codes_of(shape, dtype)
    run = fused.weight_grad(
        shape, config, after, codes if as_codes else q, step, QMIN, QMAX
    )
    run()
    w = weight_of(shape, dtype).double().requires_grad_()
    y = F.conv2d(q.double(), w, stride=shape.stride)
    (expected,) = torch.autograd.grad(y, w, grad_z)
    close(run.out['grad_w'], expected[:, :, 0, 0], dtype)


def row_of(count, **forms):
    named = {
        name.replace('_', '/', 1).replace('_', ', '): dict(ms=ms)
        for name, ms in forms.items()
    }
    return dict(count=count, forms=named)


def test_what_is_saved():
    """Codes of the backward pass need those of the forward pass."""
    rows = [
        row_of(
            2, forward_today=1.0, forward_statistics=0.9, forward_codes=1.25,
            backward_today=3.0, backward_behind=2.5, backward_codes_both=2.0,
        ),
        row_of(
            1, forward_today=1.0, forward_statistics=1.1, forward_codes=0.5,
            backward_today=2.0, backward_codes_both=2.25,
        ),
        dict(error='no time left'),
    ]  # fmt: skip
    found = fusions.summary(rows)
    assert found['layers'] == 3
    assert found['forward/today'] == 3 and found['backward/today'] == 8
    assert found['forward/statistics saves'] == dict(all=0.1, best=0.2)
    assert found['backward/codes, both saves'] == dict(all=1.75, best=2)
    assert found['saved by'] == {
        'statistics': 0.2,
        'statistics, behind': 1.2,
        'and codes': 2 * (4 - 3.25) + 0.25,
    }
    step = found['predicted step']['and codes']
    assert step['ms'] == pytest.approx(38.9 - 1.75)
    assert step['of_compiled_float'] == pytest.approx(37.15 / 37.4, abs=1e-4)


def test_a_broken_gpu_ends_one_layer(tmp_path, monkeypatch):
    """A fresh process goes on, in the time that is left."""

    class Exit(BaseException):
        pass

    def execute(program, command):
        begun.append(command[1:])
        raise Exit

    def broken(*args):
        raise RuntimeError('an illegal memory access')

    begun = []
    monkeypatch.setattr(fusions.os, 'execv', execute)
    monkeypatch.setattr(fusions, '_is_broken', lambda: True)
    monkeypatch.setattr(fusions, 'ceilings', lambda *args: {})
    monkeypatch.setattr(fusions, 'measure', broken)
    monkeypatch.setattr(fusions.torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(fusions, 'Compiler', lambda specs: Nothing())
    monkeypatch.setattr(fusions.results, 'machine', dict)
    monkeypatch.setattr(fusions.time, 'perf_counter', lambda: 5.0)
    with pytest.raises(Exit):
        fusions.main(
            ['--out', str(tmp_path), '--layers', '2', '--no-float',
             '--without', 'stem']
        )  # fmt: skip
    assert begun == [
        ['-m', 'benchmarks.fusions', '--out', str(tmp_path), '--layers', '2',
         '--batch', '256', '--size', '224', '--repeats', '20', '--minutes',
         '4.0', '--no-float', '--without', 'stem', 'layer1.*.conv1']
    ]  # fmt: skip
    row = results.read(tmp_path, fusions.FILE)[1]
    assert row['arm'] == 'layer1.*.conv1'
    assert row['error'] == 'RuntimeError: an illegal memory access'


class Nothing:
    """Stands for the compiler of kernels."""

    def errors(self, wanted):
        return {}

    def close(self):
        pass


def test_the_layers_are_those_of_resnet50():
    from collections import Counter

    from mmpretrain.models.backbones import ResNet

    found = Counter()

    def note(module, inputs, output):
        if module.kernel_size == (1, 1):
            size = inputs[0].shape[-1]
            channels = module.in_channels, module.out_channels
            found[(*channels, size, *module.stride)] += 1

    network = ResNet(50)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        network(torch.zeros(1, 3, 224, 224))
    expected = Counter()
    for each in fusions.layers():
        stride = each.stride
        expected[each.inputs, each.outputs, each.size, stride, stride] += (
            each.count
        )
    assert expected == found
    names = [each.name for each in fusions.layers()]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    """Its forms compute what today's kernels compute."""
    if DEVICE == 'cuda':
        pytest.skip('takes the whole GPU')
    command = ['--out', str(tmp_path), '--batch', '1', '--size', '16']
    command += ['--layers', '1', '--repeats', '1', '--no-float']
    command += ['--minutes', '60']
    assert fusions.main(command) == 0
    rows = {row['arm']: row for row in results.read(tmp_path, fusions.FILE)}
    names = [each.name for each in fusions.layers()][:1]
    assert [*rows] == ['ceilings', *names, 'other statistics', 'summary']
    for name in names:
        row = rows[name]
        assert {*row['forms']} == {
            *(f'forward/{form}' for form in fusions.FORWARD),
            *(f'backward/{form}' for form in fusions.BACKWARD),
        }
        assert {*row['parts']} == {
            *(p for forms in fusions.FORWARD.values() for p in forms),
            *(p for forms in fusions.BACKWARD.values() for p in forms),
        }
        assert len(row['errors']) >= 12
        assert max(row['errors'].values()) < 2e-3, row['errors']
    assert rows['summary']['layers'] == 2
    capsys.readouterr()
    assert fusions.main([*command[:-1], '0']) == 0  # nothing missing
    assert f'{names[0]} x2' in capsys.readouterr().out


@pytest.mark.slow
def test_kernels_compile_for_hopper():
    """Also those whose types only the compiler checks; without a GPU."""
    (layer,) = (x for x in fusions.layers() if x.name == 'layer2.*.conv1')
    specs = {}
    case = fusions.Case(layer, layer.shape(256, 224), 'meta')
    for name, _, spec in case.specs():
        specs.setdefault((name, spec[0]), spec)
    assert len(specs) == 1 + 7 + 2
    compiler = Compiler(specs.values(), 1)
    rows = dict(compiler.results())
    compiler.close()
    assert rows.keys() == set(specs.values())
    for (kernel, *_), row in rows.items():
        assert 'error' not in row, row
        assert row['shared'] <= MOST_SHARED
        if kernel not in ('finish_kernel', 'codes_kernel'):
            assert row['wgmma'] and row['wide_stores'], row
