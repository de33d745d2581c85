import json

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mmauxq.deploy.onnx.audit import audit_onnx
from mmauxq.errors import UsageError
from mmauxq.quantizers import LSQ
from tests.commands import audit_command, export_command
from tests.deploy.conftest import CONFIG, OPTIONS


@pytest.fixture(scope='module')
def exported(checkpoint, tmp_path_factory):
    """One of each form."""
    out = tmp_path_factory.mktemp('audit')
    for weights in ('typed', 'int8'):
        args = [CONFIG, checkpoint, '--out', out / weights, '--images', 8,
                '--weights', weights, *OPTIONS]  # fmt: skip
        assert export_command([str(a) for a in args]) == 0
    return out


def audit(capfd, *args):
    """Status and lines."""
    capfd.readouterr()
    status = audit_command([str(a) for a in [CONFIG, *args, *OPTIONS]])
    out = capfd.readouterr().out.splitlines()
    return status, [x for x in out if 'quantize' in x and 'INFO' not in x]


@pytest.mark.parametrize('weights', ['typed', 'int8'])
def test_all_hold(exported, checkpoint, capfd, weights):
    file = exported / weights / 'model.onnx'
    status, lines = audit(capfd, checkpoint, '--onnx', file, '--images', 100)
    assert status == 0
    assert lines[16] == (
        f'{checkpoint}: 16 of 16 quantized tensors hold their bits on '
        '100 images of (C, H, W) = (1, 8, 8)'
    )
    assert lines[33].startswith(f'{file}: 16 of 16')
    assert sum(x.startswith('ok      4 of    4 levels') for x in lines) > 20


def test_a_network_with_more_levels_fails(checkpoint, capfd, monkeypatch):
    def unclipped(self, x):
        step = self.broadcast(self.step, x)
        return (x / step).round() * step

    monkeypatch.setattr(LSQ, 'quantize', unclipped)
    status, lines = audit(capfd, checkpoint)
    assert status == 1
    assert any(x.startswith('WIDE') for x in lines)
    assert '16 of 16' not in lines[-1]


def change_limit(model):
    """Let one activation have more codes."""
    for tensor in model.graph.initializer:
        if tensor.name == 'backbone.layer1.0.conv1.input_quantizer.min':
            value = numpy_helper.to_array(tensor) * 4
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def claim_one_bit(model):
    """Let one weight have fewer bits than levels."""
    for entry in model.metadata_props:
        if entry.key == 'mmauxq_quantizers':
            entries = json.loads(entry.value)
            entries['backbone.layer1.0.conv1.weight_quantizer']['bits'] = 1
            entry.value = json.dumps(entries)


@pytest.mark.parametrize(
    'change, name',
    [(change_limit, 'input_quantizer'), (claim_one_bit, 'weight_quantizer')],
)
def test_a_file_with_more_levels_fails(
    exported, checkpoint, tmp_path, capfd, change, name
):
    model = onnx.load(exported / 'typed' / 'model.onnx')
    change(model)
    onnx.save(model, tmp_path / 'wide.onnx')
    status, lines = audit(capfd, checkpoint, '--onnx', tmp_path / 'wide.onnx')
    assert status == 1
    wide = [x for x in lines if x.startswith('WIDE')]
    assert len(wide) == 1
    assert wide[0].endswith(f'backbone.layer1.0.conv1.{name}')


def test_weights_are_counted_for_each_scale(tmp_path):
    """A linear weight is stored as (in, out): its scales are of columns."""
    codes = np.arange(8).repeat(3).reshape(8, 3).astype(np.int8)
    pair = ['w.codes', 'w.scale', 'w.zero']
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node('DequantizeLinear', pair, ['w'], axis=1),
                helper.make_node('MatMul', ['images', 'w'], ['logits']),
            ],
            'one layer',
            [helper.make_tensor_value_info('images', 1, ['N', 8])],
            [helper.make_tensor_value_info('logits', 1, ['N', 3])],
            [
                numpy_helper.from_array(codes, 'w.codes'),
                numpy_helper.from_array(np.ones(3, np.float32), 'w.scale'),
                numpy_helper.from_array(np.zeros(3, np.int8), 'w.zero'),
            ],
        )
    )
    entry = dict(bits=2, role='weight', codes='w.codes')
    model.metadata_props.add(
        key='mmauxq_quantizers', value=json.dumps(dict(w=entry))
    )
    onnx.save(model, tmp_path / 'model.onnx')
    (count,) = audit_onnx(tmp_path / 'model.onnx', np.zeros((1, 8)))
    assert count.levels == 8 and not count.holds


@pytest.mark.parametrize(
    'content, message',
    [
        (None, 'f.onnx does not exist'),
        (b'', 'expected a file of tools/export.py'),
        (b'text', 'expected an ONNX model'),
    ],
)
def test_a_file_that_is_none_of_ours(
    checkpoint, tmp_path, fails, content, message
):
    file = tmp_path / 'f.onnx'
    if content is not None:
        file.write_bytes(content)
    line = fails(audit_command, CONFIG, checkpoint, '--onnx', file, *OPTIONS)
    assert message in line


def with_text(change):
    def rewrite(model):
        for entry in model.metadata_props:
            if entry.key == 'mmauxq_quantizers':
                entry.value = change(entry.value)

    return rewrite


def with_first(**fields):
    """Another description of the first quantizer."""

    def change(text):
        entries = json.loads(text)
        next(iter(entries.values())).update(fields)
        return json.dumps(entries)

    return with_text(change)


def external(model):
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, '../secret')
    tensor.ClearField('raw_data')


def claim_shape(model):
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    weight.dims[0] = 2**40


def without_nodes(model):
    del model.graph.node[:]


@pytest.mark.parametrize(
    'change, message',
    [
        (with_first(bits=10**11), 'expected the bits of a role'),
        (with_first(bits='2'), 'expected the bits of a role'),
        (with_first(bits=True), 'expected the bits of a role'),
        (with_first(role='other'), 'expected the bits of a role'),
        (with_first(role=[]), 'expected the bits of a role'),
        (with_first(codes=3), 'expected the bits of a role, and codes'),
        (with_first(codes='nowhere'), 'that cannot be audited'),
        (with_text(lambda text: text[:-1]), 'expected JSON'),
        (with_text(lambda text: '[' * 10**5), 'expected JSON'),
        (with_text(lambda text: '[1]'), 'expected the bits of a role'),
        (with_text(lambda text: '{"a": null}'), 'expected the bits of a role'),
        (external, 'whose tensors are in other files'),
        (claim_shape, 'that cannot be audited'),
        (without_nodes, 'that cannot be audited'),
    ],
)
def test_a_damaged_file_is_refused(exported, tmp_path, change, message):
    model = onnx.load(exported / 'typed' / 'model.onnx')
    change(model)
    file = tmp_path / 'damaged.onnx'
    file.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match=message) as error:
        audit_onnx(file, np.zeros((1, 1, 8, 8), np.float32))
    assert '\n' not in str(error.value) and str(file) in str(error.value)
