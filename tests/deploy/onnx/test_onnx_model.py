import numpy as np
import onnx
import pytest
import torch
from torch import nn

from mmauxq.deploy.onnx import integer_bias, runtime
from mmauxq.deploy.onnx.onnx_model import OPSETS, to_onnx
from mmauxq.deploy.onnx.trace import trace
from mmauxq.deploy.onnx.verify import LOGITS, compare, differing_weights
from tests.networks import batch, joint_qat

SETTINGS = {
    'lsq2': ('LSQ', 'LSQ', 2, {}),
    'lsq4': ('LSQ', 'LSQ', 4, {}),
    'lsq8': ('LSQ', 'LSQ', 8, {}),
    'lsq3 channels': ('LSQ', 'LSQ', 3, dict(per_channel=True)),
    'dorefa3': ('DoReFaWeight', 'DoReFaActivation', 3, {}),
    'pact4': ('DoReFaWeight', 'PACTActivation', 4, {}),
    'l1 2': ('L1ScaledWeight', 'LSQ', 2, dict(per_channel=True)),
    'lsq+2': ('LSQPlus', 'LSQPlus', 2, {}),
}


# activations of one image: inputs of the eight quantized layers
CODES = 8 * 8 * 4 * 2 + 8 * 8 * 4 * 2 + 4 * 4 * 8 + 4 * 4 * 8 * 2 + 2 * 2 * 16


def run(model, images):
    session = runtime.session(model)
    return session.run(['logits'], {'images': images.numpy()})[0]


def unlabelled(images):
    return [(images, torch.full((len(images),), -1))]


def trained(weight='LSQ', activation='LSQ', bits=2, extra=None, **settings):
    quantizers = dict(
        weight=dict(type=f'mmauxq.{weight}', bits=bits, **(extra or {})),
        activation=dict(type=f'mmauxq.{activation}', bits=bits),
    )
    model = joint_qat(guidance=None, quantizers=quantizers, **settings)
    model.loss(*batch())
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            # statistics and slopes of both signs, as after training
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return model.eval().architecture


@pytest.fixture(scope='module')
def traced():
    """One trace for all: quantizers are nodes in it."""
    network = trained()
    graph = trace(network, (1, 8, 8))
    return network, graph


def lowered_like(traced, name, weights, residual='float'):
    """Another network of the same structure, in the traced graph."""
    network = trained(*SETTINGS[name])
    first, graph = traced
    network.load_state_dict(
        {
            key: value
            for key, value in first.state_dict().items()
            if '_quantizer' not in key
        },
        strict=False,
    )
    images = torch.cat([batch(seed=s)[0] for s in range(8)])
    return (
        network,
        images,
        to_onnx(network, images, weights, residual, graph),
    )


@pytest.mark.parametrize('weights', ['typed', 'int8'])
@pytest.mark.parametrize('name', SETTINGS)
def test_every_code_is_that_of_pytorch(traced, name, weights):
    network, images, lowered = lowered_like(traced, name, weights)
    result = compare(network, lowered.model, unlabelled(images), lowered)
    assert result.codes == 64 * CODES
    assert result.unexplained == 0 and result.unexplained_classes == 0
    assert result.ties < 10
    assert result.images_touched <= result.ties + result.rounded
    assert result.max_difference <= LOGITS * result.largest_logit
    assert result.holds
    # 256 levels have too many thresholds for one line
    assert result.rounded == 0 or (name, weights) == ('lsq8', 'int8')
    assert bool(lowered.rounded) == ((name, weights) == ('lsq8', 'int8'))
    assert differing_weights(network, lowered, images[:1]) == []


def test_rounded_biases_are_counted(traced):
    network, images, lowered = lowered_like(traced, 'lsq8', 'int8')
    result = compare(network, lowered.model, unlabelled(images), lowered)
    assert 0 < result.rounded < 0.02 * result.codes
    assert result.holds and 0 < max(lowered.reach.values()) < 0.5
    lowered.reach.clear()  # without the allowance they are faults
    result = compare(network, lowered.model, unlabelled(images), lowered)
    assert result.unexplained > 0 and not result.holds


def test_a_layer_without_an_exact_bias_runs_in_float(traced, monkeypatch):
    monkeypatch.setattr(integer_bias, 'fit_integer_line', lambda *args: None)
    network, images, lowered = lowered_like(traced, 'lsq4', 'int8')
    reason = lowered.float_layers['backbone.layer1.0.conv1']
    assert reason == (
        '4 of its channels have no integer bias that gives the same codes'
    )
    assert 'QLinearConv' not in runtime.operators(lowered.model)[0]
    assert compare(
        network, lowered.model, unlabelled(images), lowered
    ).ties < 10  # fmt: skip


@pytest.mark.parametrize(
    'name, kind, opset',
    [('lsq2', 'int2', 25), ('lsq4', 'int4', 21), ('dorefa3', 'int4', 21)],
)
def test_weights_take_the_narrowest_type(traced, name, kind, opset):
    _, _, lowered = lowered_like(traced, name, 'typed')
    assert set(lowered.containers.values()) == {kind}
    assert lowered.opset == opset
    assert lowered.folded or lowered.kept


def test_the_opset_is_the_first_with_the_types(traced):
    """In ONNX's own definitions, and of the int8 form as well."""
    for kind, opset in (('int4', 21), ('int2', 25)):
        for version, has in ((opset - 1, False), (opset, True)):
            schema = onnx.defs.get_schema('DequantizeLinear', version)
            types = {t for c in schema.type_constraints
                     for t in c.allowed_type_strs}  # fmt: skip
            assert (f'tensor({kind})' in types) == has
        assert opset in OPSETS
    _, _, lowered = lowered_like(traced, 'lsq2', 'int8')
    assert lowered.opset == 21
    assert lowered.model.opset_import[0].version == 21


def test_products_run_in_integer_kernels(traced):
    _, _, lowered = lowered_like(traced, 'lsq4', 'int8')
    counts, _ = runtime.operators(lowered.model)
    assert counts['QLinearConv'] == 3  # the first of each block
    _, _, lowered = lowered_like(traced, 'lsq4', 'int8', 'int8')
    counts, _ = runtime.operators(lowered.model)
    assert counts['QLinearConv'] == 8 - len(lowered.float_layers)
    assert counts['QLinearAdd'] == 3


def test_a_quantized_residual_is_near(traced):
    network, images, lowered = lowered_like(traced, 'lsq4', 'int8', 'int8')
    with torch.no_grad():
        expected = network(images, mode='tensor').numpy()
    logits = run(lowered.model, images)
    difference = np.abs(logits - expected).mean()
    assert difference < 0.2 * np.abs(expected).mean()


def test_the_batch_is_dynamic(traced):
    _, images, lowered = lowered_like(traced, 'lsq2', 'typed')
    session = runtime.session(lowered.model)
    for count in (1, 5):
        feed = {'images': images[:count].numpy()}
        assert len(session.run(['logits'], feed)[0]) == count


def test_a_wrong_network_is_found(traced):
    network, images, lowered = lowered_like(traced, 'lsq2', 'typed')
    with torch.no_grad():
        network.backbone.layer1[0].conv1.weight.copy_(
            network.backbone.layer1[0].conv1.weight.flip(0)
        )
    result = compare(network, lowered.model, unlabelled(images), lowered)
    assert result.unexplained > 0 and not result.holds
    assert differing_weights(network, lowered, images[:1]) == [
        'backbone.layer1.0.conv1.weight_quantizer'
    ]
