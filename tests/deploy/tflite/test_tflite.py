"""The form of .tflite: its integers, and what the interpreter gives."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from torch import nn

from mmauxq import optional
from mmauxq.deploy.onnx.verify import compare
from mmauxq.deploy.tflite import export as export_module
from mmauxq.deploy.tflite.convert import channels_first, integers, to_tflite
from mmauxq.deploy.tflite.export import FILES, differing_weights
from mmauxq.deploy.tflite.flatbuffer import METADATA, operators, stored_weights
from mmauxq.deploy.tflite.session import Session
from mmauxq.errors import UsageError
from mmauxq.layers import quant_class
from mmauxq.quantizers import (
    LSQ,
    DoReFaWeight,
    LSQPlus,
    calibrate,
    named_quantizers,
)
from tests.commands import export_command
from tests.deploy.conftest import CONFIG, OPTIONS
from tests.deploy.small_network import CASES, SHAPE, images, prepared

needs_litert = pytest.mark.skipif(
    any(
        importlib.util.find_spec(name) is None
        for name in ('litert_torch', 'ai_edge_litert')
    ),
    reason='needs the packages litert-torch and ai-edge-litert',
)
BATCHES = [(images(), torch.full((16,), -1))]


def compared(network, converted):
    return compare(
        network,
        converted.content,
        BATCHES,
        converted,
        Session,
        lambda content, names: converted.inspected,
    )


def schema_of(content):
    from ai_edge_litert.tools import flatbuffer_utils

    return flatbuffer_utils.read_model_from_bytearray(bytearray(content))


# --- the integers of a weight ------------------------------------------------


@pytest.mark.parametrize(
    'quantizer, bits, lowest, stride',
    [
        (LSQ(2, 'weight', 4), 2, 0, 1),
        (LSQ(3, 'weight', 4), 4, 0, 1),
        (LSQ(4, 'weight'), 4, 0, 1),
        (LSQPlus(5, 'weight', 4), 8, 0, 1),
        (DoReFaWeight(2), 2, 1, 2),
        (DoReFaWeight(4), 4, 1, 2),
        (DoReFaWeight(8), 8, 1, 2),
    ],
)
def test_integers_of_a_weight(quantizer, bits, lowest, stride):
    torch.manual_seed(0)
    operand = torch.randn(4, 3, 5, 2)
    quantizer.calibrate(operand)
    weight = integers(quantizer, operand)
    assert (weight.bits, weight.lowest, weight.stride) == (
        bits, lowest, stride,
    )  # fmt: skip
    assert weight.index.shape == (4, 5, 2, 3)
    half = 2 ** (quantizer.bits - 1)
    assert weight.index.min() >= -half and weight.index.max() < half
    index = torch.from_numpy(weight.index)
    assert torch.equal(weight.codes(index), quantizer.codes(operand))
    scale = torch.from_numpy(weight.scale).reshape(-1, 1, 1, 1)
    value = channels_first(index) * scale
    if weight.offset is not None:
        value = value + weight.offset
    expected = quantizer(operand).detach()
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_a_linear_weight_keeps_its_axes():
    torch.manual_seed(0)
    operand = torch.randn(4, 3)
    quantizer = LSQ(2, 'weight', 4)
    quantizer.calibrate(operand)
    expected = quantizer.codes(operand).numpy()
    np.testing.assert_array_equal(integers(quantizer, operand).index, expected)


# --- in the interpreter ------------------------------------------------------


@pytest.fixture(
    scope='module',
    params=[
        'LSQ, 2 bits',
        'LSQ, 8 bits',
        'LSQ+, 4 bits',
        'DoReFa and PACT, 4 bits',
    ],
)
def pair(request):
    network = prepared(*CASES[request.param])
    return network, to_tflite(network, images(1), dict(mean=[1.0]))


@needs_litert
def test_every_code(pair):
    network, converted = pair
    result = compared(network, converted)
    assert result.holds and result.ties < 10 and result.same_class == 16
    assert result.codes == 16 * (3 * 36 + 8 * 36 + 8)
    assert differing_weights(network, converted, BATCHES) == []


@needs_litert
def test_what_the_file_holds(pair):
    from ai_edge_litert.schema_py_generated import TensorType

    network, converted = pair
    model = schema_of(converted.content)
    (graph,), (signature,) = model.subgraphs, model.signatureDefs
    tensors = {tensor.name.decode(): tensor for tensor in graph.tensors}
    quantizers = dict(named_quantizers(network))
    types = {2: TensorType.INT2, 4: TensorType.INT4, 8: TensorType.INT8}
    for name, quantizer in quantizers.items():
        tensor = tensors[f'{name}.codes']
        if quantizer.role == 'weight':
            assert tensor.type == types[quantizer.bits]
            grid = quantizer.grid()
            scale = (grid.scale * grid.stride).numpy(force=True)
            np.testing.assert_array_equal(tensor.quantization.scale, scale)
            assert not np.any(tensor.quantization.zeroPoint)
            assert tensor.quantization.quantizedDimension == 0
            data = model.buffers[tensor.buffer].data
            count = int(np.prod(tensor.shape))
            assert len(data) == -(-count * quantizer.bits // 8)
        else:
            assert tensor.type == TensorType.FLOAT32
    assert [entry.name for entry in signature.inputs] == [b'images']
    assert [entry.name for entry in signature.outputs] == [b'logits']
    assert list(graph.tensors[graph.inputs[0]].shape) == [1, *SHAPE]
    counts = operators(converted.content)
    assert counts['DEQUANTIZE'] == 3
    assert counts['TRANSPOSE'] == 1  # of the image
    (about,) = (m for m in model.metadata if m.name == METADATA.encode())
    text = bytes(model.buffers[about.buffer].data).decode()
    entries = json.loads(text)
    assert entries['mean'] == [1.0]
    assert entries['mmauxq_quantizers'] == {
        name: dict(bits=q.bits, role=q.role) for name, q in quantizers.items()
    }


@needs_litert
def test_depthwise_and_grouped_convolutions():
    def quantized(layer, channels):
        return quant_class(type(layer)).from_float(
            layer, LSQ(4, 'weight', channels), LSQ(4)
        )

    torch.manual_seed(0)
    layers = nn.Sequential(
        quantized(nn.Conv2d(3, 8, 3, padding=1, stride=2), 8),
        nn.ReLU6(),
        quantized(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), 8),
        quantized(nn.Conv2d(8, 8, 3, padding=1, groups=2), 8),
        nn.MaxPool2d(2),
        nn.Flatten(),
        quantized(nn.Linear(8, 5, bias=False), 5),
    )

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x, mode='tensor'):
            return self.layers(x)

    network = Net().eval()
    calibrate(network, lambda: network(images()))
    converted = to_tflite(network, images(1), {})
    result = compared(network, converted)
    assert result.holds and result.ties < 10
    assert result.codes == 16 * (3 * 36 + 2 * 8 * 9 + 8)
    assert differing_weights(network, converted, BATCHES) == []


@needs_litert
def test_wrong_codes_are_found():
    network = prepared(*CASES['LSQ, 3 bits'])
    converted = to_tflite(network, images(1), {})
    with torch.no_grad():
        network.layers[3].weight[0, 0] += 0.5
    name = 'layers.3.weight_quantizer'
    assert differing_weights(network, converted, BATCHES) == [name]
    result = compared(network, converted)
    assert not result.holds


@needs_litert
def test_the_command(checkpoint, tmp_path, capfd):
    out = tmp_path / 'out'
    args = [CONFIG, checkpoint, '--out', out, '--format', 'tflite', *OPTIONS]
    assert export_command([*map(str, args), '--images', '64']) == 0
    printed = capfd.readouterr().out
    assert 'bytes; 8 weights as int2\n' in printed
    assert {file.name for file in out.iterdir()} == set(FILES)
    report = json.loads((out / 'report.json').read_text())
    size = (out / 'model.tflite').stat().st_size
    assert report['sizes']['model.tflite'] == size < 30_000
    assert set(report['tflite']['containers'].values()) == {'int2'}
    assert report['tflite']['weight_codes'] == 19_072
    assert report['runtime']['ai-edge-litert']
    assert set(report['sha256']) == set(FILES) - {'report.json'}
    agreement = report['agreement']['model.tflite']
    assert agreement['holds'] and agreement['images'] == 64
    assert agreement['codes'] == 64 * (4 * 512 + 3 * 256 + 128)
    page = (out / 'report.md').read_text()
    assert 'All 19,072 codes of weights were read from the file' in page
    assert f'| `model.tflite` | {size:,} |' in page
    stored = stored_weights((out / 'model.tflite').read_bytes())
    assert len(stored) == 8
    assert {code for a in stored.values() for code in np.unique(a)} == {
        -2, -1, 0, 1,
    }  # fmt: skip


@needs_litert
def test_a_file_that_differs_is_not_written(
    network, checkpoint, tmp_path, monkeypatch
):
    true = export_module.to_tflite

    def wrong(architecture, *args):
        converted = true(architecture, *args)
        with torch.no_grad():
            architecture.head.fc.bias[0] += 0.1
        return converted

    monkeypatch.setattr(export_module, 'to_tflite', wrong)
    with pytest.raises(UsageError, match='model.tflite differs from PyTorch'):
        export_module.export(network, checkpoint, tmp_path / 'out', images=0)
    assert not (tmp_path / 'out').exists()


# --- what is refused ---------------------------------------------------------


@needs_litert
def test_a_quantizer_that_runs_twice():
    network = prepared(*CASES['LSQ, 2 bits'])
    network.layers[4] = network.layers[3]
    expected = 'layers.3.input_quantizer: expected a quantizer that runs once'
    with pytest.raises(UsageError, match=expected):
        to_tflite(network, images(1), {})


@needs_litert
def test_a_network_that_the_converter_refuses():
    class Branch(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    network = prepared(*CASES['LSQ, 2 bits'])
    network.layers[1] = Branch()
    with pytest.raises(
        UsageError, match='litert-torch .* cannot convert'
    ) as e:
        to_tflite(network, images(1), {})
    assert '\n' not in str(e.value)


@needs_litert
def test_a_file_that_the_interpreter_refuses():
    with pytest.raises(UsageError, match='ai-edge-litert .* refuses') as error:
        Session(b'no such file')
    assert '\n' not in str(error.value)


@needs_litert
def test_a_network_above_the_limit(network, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, 'LIMIT', 1000)
    with pytest.raises(UsageError, match='expected at most 1,000 bytes'):
        export_module.export(network, checkpoint, tmp_path / 'out')


@pytest.mark.parametrize(
    'option', [('--weights', 'typed'), ('--residual', 'int8')]
)
def test_options_that_contradict(checkpoint, tmp_path, fails, option):
    out = tmp_path / 'out'
    args = [CONFIG, checkpoint, '--out', out, '--format', 'tflite', *OPTIONS]
    assert fails(export_command, *args, *option) == (
        f'error: --format tflite: expected no {option[0]} beside it, which is '
        f'for --format onnx, got {" ".join(option)}'
    )
    assert not out.exists()


@pytest.mark.parametrize('package', ['litert_torch', 'ai_edge_litert'])
def test_without_a_package(checkpoint, tmp_path, fails, monkeypatch, package):
    def find(name, *args):
        return None if name == package else pytest.__spec__

    monkeypatch.setattr(optional.importlib.util, 'find_spec', find)
    out = tmp_path / 'out'
    args = [CONFIG, checkpoint, '--out', out, '--format', 'tflite', *OPTIONS]
    assert fails(export_command, *args) == (
        f'error: this needs the package {package}, which is not installed: '
        'pip install "mmauxq[tflite]"'
    )
    assert not out.exists()


def test_a_folder_with_a_file_of_that_name(
    checkpoint, tmp_path, fails, monkeypatch
):
    monkeypatch.setattr(
        optional.importlib.util, 'find_spec', lambda *args: pytest.__spec__
    )
    (tmp_path / 'model.tflite').write_bytes(b'mine')
    args = [CONFIG, checkpoint, '--out', tmp_path, '--format', 'tflite']
    assert 'which holds model.tflite but no report.json of an export' in (
        fails(export_command, *args, *OPTIONS)
    )
    assert (tmp_path / 'model.tflite').read_bytes() == b'mine'


@needs_litert
def test_a_layer_that_is_multiplied_by_zero():
    """As in a network whose residual branches were never trained."""
    network = prepared(*CASES['LSQ, 2 bits'])
    torch.nn.init.zeros_(network.layers[4].weight)
    converted = to_tflite(network, images(1), {})
    with pytest.raises(UsageError, match='that the converter left out'):
        differing_weights(network, converted, BATCHES)
