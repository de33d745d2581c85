"""Quantizers of other tools, in the seat of ours."""

import sys
from importlib.util import find_spec

import pytest
import torch
from mmengine.config import Config
from torch import nn

import mmauxq.algorithms  # noqa: F401  (before anything is forked)
from benchmarks.peers.quantizers import (
    BrevitasBest,
    BrevitasLearned,
    MMRazorLSQ,
    mmrazor_quantizer,
)
from mmauxq import compat
from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.errors import UsageError
from mmauxq.layers import LayerBits, convert
from tests.conftest import ROOT
from tests.engine.test_resume import SMALL, last
from tests.support import killing

needs_brevitas = pytest.mark.skipif(
    find_spec('brevitas') is None,
    reason='needs brevitas, which asks for another setuptools',
)
pytestmark = pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
FOLDER = ROOT / 'benchmarks/peers'
CODES = [
    (MMRazorLSQ, 'weight', [-2, -1, 0, 1]),
    (MMRazorLSQ, 'activation', [0, 1, 2, 3]),
    (BrevitasLearned, 'weight', [-1, 0, 1]),
    (BrevitasLearned, 'activation', [0, 1, 2, 3]),
    (BrevitasBest, 'weight', [-2, -1, 0, 1]),
    (BrevitasBest, 'activation', [0, 1, 2, 3]),
]


def quantizers(cases):
    """Cases that begin with a class; those of brevitas may be skipped."""
    return [
        pytest.param(
            *case, marks=[] if case[0] is MMRazorLSQ else needs_brevitas
        )
        for case in cases
    ]


each = pytest.mark.parametrize(
    'cls, role', quantizers(case[:2] for case in CODES)
)


def sample(role):
    x = torch.randn(4, 3, 5, 5)
    return x if role == 'weight' else x.relu()


def started(cls, role, x, bits=2):
    """A quantizer after the pass that calibrates."""
    quantizer = cls(bits, role)
    quantizer.calibrate(x)
    with torch.no_grad():
        quantizer(x)
    return quantizer


def step_of(values):
    """Distance of even levels."""
    return values.unique().diff().min()


@pytest.mark.parametrize('cls, role, codes', quantizers(CODES))
def test_codes_of_two_bits(cls, role, codes):
    x = sample(role)
    quantizer = started(cls, role, x)
    levels = quantizer(10 * x).unique()
    assert (levels / step_of(levels)).tolist() == pytest.approx(codes)


@each
@pytest.mark.parametrize('bits', [3, 4, 8])
def test_levels_of_other_bits(cls, role, bits):
    x = sample(role)
    quantizer = started(cls, role, x, bits).eval()
    wide = torch.linspace(-300, 300, 6001) * step_of(quantizer(x))
    narrow = (cls, role) == (BrevitasLearned, 'weight')
    assert len(quantizer(wide).unique()) == 2**bits - narrow


@each
def test_gradients_reach_the_operand_and_the_scale(cls, role):
    x = sample(role)
    quantizer = started(cls, role, x)
    x.requires_grad_()
    (quantizer(x) * torch.randn_like(x)).sum().backward()
    (scale,) = quantizer.parameters()
    assert x.grad.any()
    # it is not learned while brevitas collects statistics
    collects = (cls, role) == (BrevitasLearned, 'activation')
    assert bool(scale.grad.any()) != collects


@each
def test_parameters_stay_the_same_objects(cls, role):
    """The optimizer is built before a batch is seen or a state loaded."""
    x = sample(role)
    quantizer = cls(2, role)
    before = list(quantizer.parameters())
    state = started(cls, role, x).state_dict()
    quantizer.load_state_dict(state)
    quantizer(x)
    (one,), (other,) = before, quantizer.parameters()
    assert one is other


@each
def test_a_loaded_one_goes_on(cls, role):
    x = sample(role)
    first = started(cls, role, x)
    second = cls(2, role)
    second.load_state_dict(first.state_dict())
    for k in range(4):
        assert torch.equal(first(x * k), second(x * k))
    assert torch.equal(first.eval()(x), second.eval()(x))


# --- what the tools document -------------------------------------------------


@pytest.mark.parametrize('role, qmax', [('weight', 1), ('activation', 3)])
def test_mmrazor_starts_as_lsq_does(role, qmax):
    x = sample(role)
    scale = started(MMRazorLSQ, role, x).tool.scale
    assert scale.item() == pytest.approx(2 * x.abs().mean() / qmax**0.5)


@pytest.mark.parametrize('role', ['weight', 'activation'])
def test_mmrazor_gives_what_its_module_gives(role):
    """Here the module is driven as mmrazor's loop does."""
    x, y = sample(role), sample(role)
    quantizer, tool = started(MMRazorLSQ, role, x), mmrazor_quantizer(2, role)
    tool.enable_static_estimate()
    tool(x)
    tool.enable_param_learning()
    grads = []
    for run in (quantizer, tool):
        inputs = [y.clone().requires_grad_(), *run.parameters()]
        values = run(inputs[0])
        grads.append([values, *torch.autograd.grad(values.sum(), inputs)])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@needs_brevitas
def test_usual_weights_of_brevitas_start_at_the_largest():
    w = sample('weight')
    levels = started(BrevitasLearned, 'weight', w)(w).unique()
    assert levels[-1] == w.abs().max()


@needs_brevitas
def test_usual_activations_of_brevitas_start_at_a_percentile():
    x = torch.rand(500, 1000)
    x[0, :3] = 1000.0  # of 500000 values, five are above the percentile
    levels = started(BrevitasLearned, 'activation', x)(x).unique()
    assert 0.999 < levels[-1] < 1


@needs_brevitas
@pytest.mark.parametrize('role, top', [('weight', 2), ('activation', 3)])
def test_the_best_of_brevitas_starts_at_the_least_error(role, top):
    x = sample(role)
    values = started(BrevitasBest, role, x)(x)
    low = -2 if role == 'weight' else 0
    errors = []
    for part in range(1, 21):
        step = x.abs().max() * part / 20 / top
        codes = (x / step).round().clamp(low, low + 3)
        errors.append((codes * step - x).square().sum().item())
    error = (values - x).square().sum().item()
    assert error == pytest.approx(min(errors))


@needs_brevitas
@pytest.mark.filterwarnings('ignore:Named tensors:UserWarning')
def test_brevitas_trains_as_its_own_layer():
    from brevitas.core.scaling import ScalingImplType
    from brevitas.nn import QuantConv2d
    from brevitas.quant import Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    theirs = QuantConv2d(
        3,
        4,
        3,
        weight_quant=Int8WeightPerTensorFloat,
        weight_bit_width=2,
        weight_scaling_impl_type=ScalingImplType.PARAMETER_FROM_STATS,
        input_quant=Uint8ActPerTensorFloat,
        input_bit_width=2,
        input_collect_stats_steps=3,
    )
    ours = nn.Conv2d(3, 4, 3)
    state = {k: v.clone() for k, v in theirs.named_parameters()}
    ours.load_state_dict({k: state[k] for k in ('weight', 'bias')})
    kind = dict(type=BrevitasLearned)
    ours = convert(ours, {'': LayerBits(2, 2, '')}, kind, kind)
    scaling = ours.input_quantizer.tool.scaling_impl
    scaling.collect_stats_steps = 4  # one more, of the pass that calibrates
    batches = torch.rand(8, 2, 3, 6, 6)
    ours.weight_quantizer.calibrate(ours.weight)
    ours.input_quantizer.calibrate(batches[0])
    ours(batches[0])
    before = scaling.value.item()
    results = []
    for layer in (ours, theirs):
        optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
        outputs = []
        for x in batches:
            y = layer(x)
            outputs.append(y)
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
        outputs.append(layer.eval()(batches[0]))
        results.append(torch.stack([y.detach() for y in outputs]))
    assert torch.equal(*results)
    assert scaling.value.item() != before


@needs_brevitas
def test_statistics_are_those_of_brevitas():
    """Its defaults are ours, but for the one that is said."""
    steps = {
        cls: cls(2).tool.scaling_impl.collect_stats_steps
        for cls in (BrevitasLearned, BrevitasBest)
    }
    assert steps == {BrevitasLearned: 300, BrevitasBest: 1}


# --- the seat ----------------------------------------------------------------


@each
def test_what_it_cannot_do_is_said(cls, role):
    with pytest.raises(UsageError, match='expected bits from 2 to 8'):
        cls(1, role)
    bits = {'': LayerBits(2, 2, '')}
    each_channel = dict(type=cls, per_channel=True)
    with pytest.raises(UsageError, match='no per-channel form'):
        convert(nn.Conv2d(1, 1, 1), bits, each_channel, each_channel)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'brevitas', None)
    with pytest.raises(UsageError, match='needs the package brevitas'):
        BrevitasLearned(2)


@each
def test_floating_point_needs_no_tool(cls, role):
    x = torch.randn(3)
    assert cls(32, role)(x) is x


@each
def test_building_draws_no_random_number(cls, role):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    cls(2, role)
    assert torch.equal(torch.rand(1), expected)


RECIPES = quantizers(
    [
        (MMRazorLSQ, 'mmrazor'),
        (BrevitasLearned, 'brevitas'),
        (BrevitasBest, 'brevitas_best'),
    ]
)


@pytest.mark.parametrize('cls, name', RECIPES)
@pytest.mark.parametrize('task', ['r20_w2a2_digits', 'r18_w2a2_tiny'])
def test_a_recipe_differs_in_its_quantizers(cls, name, task):
    ours = Config.fromfile(ROOT / f'configs/qat_{task}.py')
    theirs = Config.fromfile(FOLDER / f'{name}_{task}.py')
    for quantizer in theirs.model.quantizers.values():
        assert quantizer == dict(type=f'mmauxq.{cls.__name__}', bits=2)
    theirs.model.quantizers = ours.model.quantizers
    assert theirs.model.pop('speed') == 'eager'
    assert theirs.pop('custom_imports')
    assert theirs.to_dict() == ours.to_dict()


@pytest.mark.parametrize('cls, name', RECIPES)
def test_resumed_after_a_kill_is_bit_equal(tmp_path, cls, name):
    """And the scales are trained."""
    compat.enable_safe_checkpoints()
    config, log = tmp_path / 'config.py', tmp_path / 'log'
    recipe = FOLDER / f'{name}_r20_w2a2_digits.py'
    config.write_text(
        SMALL.format(recipe=recipe, name=f'{name}_{tmp_path.name}')
        # usual weights of brevitas end in NaN with that of the recipe
        + 'optim_wrapper = dict(optimizer=dict(lr=0.01))\n'
        # with it, no gradient enters a block at first
        + "model['architecture']['backbone']['zero_init_residual'] = False\n"
    )
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    status = killing.run_train([config, '--work-dir', whole], log)
    assert status == 0, log.read_text()[-3000:]
    words = [config, '--work-dir', killed, '--resume']
    assert killing.run_train(words, log, killing.at_step(6)) == -9
    assert killing.run_train(words, log) == 0, log.read_text()[-3000:]
    assert killing.differences(last(whole), last(killed)) == []
    states = [
        read_checkpoint(file)['state_dict']
        for file in (whole / 'epoch_1.pth', last(whole))
    ]
    scales = [
        key
        for key in states[0]
        if key.endswith(('tool.scale', 'scaling_impl.value'))
    ]
    assert len(scales) == 16
    same = [k for k in scales if torch.equal(*(s[k] for s in states))]
    # usual activations of brevitas collect statistics for 300 steps
    assert len(same) == (8 if cls is BrevitasLearned else 0)
