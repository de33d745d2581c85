"""The form of QONNX: its nodes, a reference of its operator, its executor."""

import copy
import importlib.util
import json
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from mmauxq import optional
from mmauxq.analysis import count_levels
from mmauxq.deploy.folder import FILES
from mmauxq.deploy.network import load_network
from mmauxq.deploy.onnx import export as export_module
from mmauxq.deploy.onnx.audit import audit_onnx
from mmauxq.deploy.onnx.graph import add_metadata
from mmauxq.deploy.onnx.lower_qonnx import quant_range
from mmauxq.deploy.onnx.onnx_model import to_onnx
from mmauxq.deploy.onnx.qonnx_executor import DOMAIN
from mmauxq.deploy.onnx.trace import trace
from mmauxq.deploy.onnx.verify import compare
from mmauxq.errors import UsageError
from mmauxq.quantizers import calibrate, named_quantizers
from mmauxq.quantizers.base import Grid
from tests.commands import export_command
from tests.deploy.conftest import CONFIG, OPTIONS
from tests.deploy.small_network import CASES, SHAPE, images, prepared

needs_executor = pytest.mark.skipif(
    importlib.util.find_spec('qonnx') is None,
    reason='needs the package qonnx, which is not there for Python 3.10',
)


def quant(x, scale, zero, bits, *, signed, narrow):
    """The operator as its specification says, with mode ROUND."""
    top = 2 ** (bits - signed) - 1
    low = narrow - 2 ** (bits - 1) if signed else 0
    high = top if signed else top - narrow
    return (np.round(np.clip(x / scale + zero, low, high)) - zero) * scale


def quants(model):
    """Output -> node, of all ``Quant`` nodes."""
    return {n.output[0]: n for n in model.graph.node if n.op_type == 'Quant'}


def constants(model):
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
    }


def settings(node):
    """signed, narrow and rounding_mode of a node."""
    values = {
        a.name: onnx.helper.get_attribute_value(a) for a in node.attribute
    }
    assert values.pop('rounding_mode') == b'ROUND'
    return values


@pytest.fixture
def network_of_digits(small_config, checkpoint):
    return load_network(small_config, str(checkpoint))


@pytest.fixture(scope='module')
def graph():
    """The trace, which is the same for all quantizers."""
    return trace(prepared(*CASES['LSQ, 2 bits']), SHAPE)


@pytest.fixture(params=CASES.values(), ids=CASES)
def network(request):
    return prepared(*request.param)


def lower(network, graph):
    return to_onnx(network, images(), 'qonnx', traced=graph)


def test_each_quantizer_is_one_node_with_its_codes(network, graph):
    """Weights, by the reference of the operator; the range of activations."""
    lowered = lower(network, graph)
    onnx.checker.check_model(lowered.model)
    nodes, values = quants(lowered.model), constants(lowered.model)
    quantizers = dict(named_quantizers(network))
    assert set(nodes) == {f'{name}.value' for name in quantizers}
    for name, quantizer in quantizers.items():
        node, grid = nodes[f'{name}.value'], quantizer.grid()
        assert node.domain == DOMAIN
        scale, zero, bits = (values[key] for key in node.input[1:])
        assert scale.dtype == zero.dtype == np.float32 and zero == 0
        np.testing.assert_array_equal(scale.flatten(), grid.scale.detach())
        ends = np.array([-1e6, 1e6], np.float32)
        reached = quant(ends, 1.0, zero, int(bits), **settings(node))
        assert reached.tolist() == [grid.qmin, grid.qmax]
        if quantizer.role == 'weight':
            stored = values[node.input[0]]
            y = quant(stored, scale, zero, int(bits), **settings(node))
            weight = network.get_submodule(name.rpartition('.')[0]).weight
            expected = quantizer(weight).detach().numpy()
            np.testing.assert_array_equal(y, stored)
            np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)


def test_the_scale_of_a_channel_stands_on_its_axis(graph):
    values = constants(lower(prepared(*CASES['LSQ, 2 bits']), graph).model)
    assert values['layers.0.weight_quantizer.scale'].shape == (8, 1, 1, 1)
    assert values['layers.8.weight_quantizer.scale'].shape == (5, 1)
    assert values['layers.8.input_quantizer.scale'].shape == ()


def test_a_signed_input_is_signed_and_a_rectified_one_is_not(graph):
    nodes = quants(lower(prepared(*CASES['LSQ, 3 bits']), graph).model)
    for layer, signed in ((0, 1), (3, 0), (8, 1)):
        node = nodes[f'layers.{layer}.input_quantizer.value']
        assert settings(node) == dict(signed=signed, narrow=0)


def test_an_offset_stands_around_the_node(graph):
    model = lower(prepared(*CASES['LSQ+, 4 bits']), graph).model
    name = 'layers.8.input_quantizer'
    after = {key: n for n in model.graph.node for key in n.input}
    node = quants(model)[f'{name}.value']
    before = next(n for n in model.graph.node if node.input[0] in n.output)
    assert before.op_type == 'Relu'  # see the next test
    before = next(n for n in model.graph.node if before.input[0] in n.output)
    assert before.op_type == 'Sub' and after[node.output[0]].op_type == 'Add'
    assert (
        before.input[1] == after[node.output[0]].input[1] == f'{name}.offset'
    )
    assert constants(model)[f'{name}.offset'] < 0  # of the SiLU before it


def test_an_unsigned_quantizer_has_a_relu_of_its_own(graph):
    """FINN merges the two nodes, and takes the ReLU from all who read it."""
    model = lower(prepared(*CASES['DoReFa, 8 bits']), graph).model
    takers = Counter(name for node in model.graph.node for name in node.input)
    producers = {n.output[0]: n for n in model.graph.node}
    for layer in (0, 3, 8):
        node = producers[f'layers.{layer}.input_quantizer.value']
        source = producers[node.input[0]]
        assert source.op_type == 'Relu' and takers[node.input[0]] == 1
    assert [n.op_type for n in model.graph.node].count('Relu') == 3


def test_what_front_ends_read(graph):
    model = lower(prepared(*CASES['LSQ, 2 bits']), graph).model
    shapes = [
        [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    ]
    assert shapes == [[1, *SHAPE], [1, 5]]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count('BatchNormalization') == 2
    assert 'GlobalAveragePool' in kinds and 'ReduceMean' not in kinds
    versions = [(o.domain, o.version) for o in model.opset_import]
    assert versions == [('', 21), (DOMAIN, 1)]


@pytest.mark.parametrize('ends', [(-2, 2), (0, 2), (-3, 4)])
def test_codes_that_the_operator_has_not(ends):
    grid = Grid(torch.ones(1), None, *ends)
    expected = f'layer: expected codes of .* got {ends[0]} to {ends[1]}'
    with pytest.raises(UsageError, match=expected):
        quant_range('layer', grid)


def test_ternary_codes_are_narrow():
    assert quant_range('layer', Grid(torch.ones(1), None, -1, 1)) == (1, 1, 2)


# --- in the executor of the package ------------------------------------------


@needs_executor
def test_every_code_in_the_executor(network, graph):
    from mmauxq.deploy.onnx.qonnx_executor import Session, differing_weights

    lowered = lower(network, graph)
    batches = [(images(), torch.full((16,), -1))]
    result = compare(network, lowered.model, batches, lowered, Session)
    assert result.holds and result.ties < 10 and result.same_class == 16
    assert result.codes == 16 * (3 * 36 + 8 * 36 + 8)
    assert differing_weights(network, lowered, images(1)) == []


def change(model, name, scale):
    """Multiply a constant of the exported model."""
    for tensor in model.graph.initializer:
        if tensor.name == name:
            value = numpy_helper.to_array(tensor) * np.float32(scale)
            tensor.CopyFrom(numpy_helper.from_array(value, name))


@needs_executor
def test_a_wrong_file_is_found(graph):
    from mmauxq.deploy.onnx.qonnx_executor import Session, differing_weights

    network = prepared(*CASES['LSQ, 3 bits'])
    name = 'layers.3.weight_quantizer'
    lowered = lower(network, graph)
    change(lowered.model, f'{name}.weight', 0.4)
    assert differing_weights(network, lowered, images(1)) == [name]
    lowered = lower(network, graph)
    change(lowered.model, 'layers.3.input_quantizer.scale', 1.1)
    batches = [(images(), torch.full((16,), -1))]
    result = compare(network, lowered.model, batches, lowered, Session)
    assert not result.holds and result.unexplained > 0


@needs_executor
def test_many_images_run_in_parts(graph, monkeypatch):
    from mmauxq.deploy.onnx import qonnx_executor

    network = prepared(*CASES['LSQ, 2 bits'])
    lowered = lower(network, graph)
    feed = {'images': images(7).numpy()}
    names = ['logits', 'layers.3.input_quantizer.value']
    whole = qonnx_executor.Session(lowered.model).run(names, feed)
    monkeypatch.setattr(qonnx_executor, 'MOST_VALUES', 8000)
    session = qonnx_executor.Session(lowered.model)
    assert 1 <= session._at_once < 7
    parts = session.run(names, feed)
    np.testing.assert_allclose(parts[0], whole[0], atol=1e-5)
    np.testing.assert_array_equal(parts[1], whole[1])


@needs_executor
@pytest.mark.parametrize(
    'quantizer, ends', [('LSQ', 32), ('LSQPlus', 8)], ids=['LSQ', 'LSQ+, ends']
)
def test_a_resnet_at_4_bits(small_config, quantizer, ends):
    """Also with the first and the last layer at 8 bits."""
    from mmauxq.deploy.network import build
    from mmauxq.deploy.onnx.qonnx_executor import Session, differing_weights

    cfg = copy.deepcopy(small_config)
    for role in ('weight', 'activation'):
        cfg.model.quantizers[role] = dict(type=f'mmauxq.{quantizer}', bits=4)
    cfg.model.policy = dict(first=ends, last=ends, layers={})
    torch.manual_seed(0)
    algorithm = build(cfg, None)
    algorithm.init_weights()
    network = algorithm.architecture.eval()
    digits = torch.randn(8, 1, 8, 8)
    calibrate(network, lambda: network(digits, mode='tensor'))
    lowered = to_onnx(network, digits, 'qonnx')
    widths = list(lowered.containers.values())
    assert widths.count('int4') == 8
    assert widths.count('int8') == (2 if ends == 8 else 0)
    batches = [(digits, torch.full((8,), -1))]
    result = compare(network, lowered.model, batches, lowered, Session)
    assert result.holds and result.codes > 8 * 2048 and result.ties < 10
    assert differing_weights(network, lowered, digits[:1]) == []


@needs_executor
def test_the_command(checkpoint, tmp_path, capfd):
    out = tmp_path / 'out'
    args = [CONFIG, checkpoint, '--out', out, '--format', 'qonnx', *OPTIONS]
    assert export_command([*map(str, args), '--images', '64']) == 0
    assert '16 Quant nodes' in capfd.readouterr().out
    assert {file.name for file in out.iterdir()} == set(FILES)
    report = json.loads((out / 'report.json').read_text())
    assert report['onnx']['weights'] == 'qonnx'
    assert report['onnx']['operators']['Quant'] == 16
    assert len(report['onnx']['batch_norms_kept']) == 8
    assert set(report['onnx']['containers'].values()) == {'int2'}
    agreement = report['agreement']['model.onnx']
    assert agreement['holds'] and agreement['images'] == 64
    assert agreement['codes'] == 64 * (4 * 512 + 3 * 256 + 128)
    model = onnx.load(out / 'model.onnx')
    assert len(quants(model)) == 16
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    about = json.loads(metadata['mmauxq_quantizers'])
    assert {entry['codes'] for entry in about.values()} == set(quants(model))
    page = (out / 'report.md').read_text()
    assert 'ran in the executor of the package qonnx' in page
    assert 'weights as int2 (`--format qonnx`)' in page


@needs_executor
def test_levels_of_a_file(network, graph, tmp_path):
    lowered = lower(network, graph)
    add_metadata(lowered, network, {})
    onnx.save(lowered.model, tmp_path / 'model.onnx')
    found = audit_onnx(tmp_path / 'model.onnx', images().numpy())
    expected = {c.name: c.levels for c in count_levels(network, images())}
    assert {count.name: count.levels for count in found} == expected
    assert all(count.holds for count in found)


# --- what is refused ---------------------------------------------------------


@pytest.mark.parametrize(
    'option', [('--weights', 'typed'), ('--residual', 'int8')]
)
def test_options_that_contradict(checkpoint, tmp_path, fails, option):
    out = tmp_path / 'out'
    args = [CONFIG, checkpoint, '--out', out, '--format', 'qonnx', *OPTIONS]
    assert fails(export_command, *args, *option) == (
        f'error: --format qonnx: expected no {option[0]} beside it, which is '
        f'for --format onnx, got {" ".join(option)}'
    )
    assert not out.exists()


def test_without_the_package(checkpoint, tmp_path, fails, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        optional.importlib.util,
        'find_spec',
        lambda name, *args: None if name == 'qonnx' else found(name, *args),
    )
    out = tmp_path / 'out'
    args = [CONFIG, checkpoint, '--out', out, '--format', 'qonnx', *OPTIONS]
    assert fails(export_command, *args) == (
        'error: this needs the package qonnx, which is not installed: '
        'pip install "mmauxq[qonnx]"'
    )
    assert not out.exists()


@needs_executor
def test_a_file_that_differs_is_not_written(
    network_of_digits, checkpoint, tmp_path, monkeypatch
):
    true = export_module.to_onnx

    def wrong(*args):
        lowered = true(*args)
        name = 'backbone.layer1.0.conv2.input_quantizer.scale'
        change(lowered.model, name, 1.5)
        return lowered

    monkeypatch.setattr(export_module, 'to_onnx', wrong)
    with pytest.raises(UsageError, match='model.onnx differs from PyTorch'):
        export_module.export(
            network_of_digits, checkpoint, tmp_path / 'out', 'qonnx', images=0
        )
    assert not (tmp_path / 'out').exists()
