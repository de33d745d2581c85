import math
from functools import partial

import pytest
import torch
from mmengine.evaluator import Evaluator

from mmauxq.analysis import count_levels
from mmauxq.analysis.sensitivity import (
    Validation,
    as_they_are,
    at_bits,
    divergence,
    loss_at,
    sensitivities,
    width_at,
)
from mmauxq.layers import LayerBits
from mmauxq.quantizers import calibrate, named_quantizers, uncalibrated
from tests.networks import QUANTIZERS, SHAPE, batch, joint_qat

NAME = 'backbone.layer2.0.conv1'
LOW = {NAME: LayerBits(2, 2, '')}
FIRST = {'backbone.conv1': LayerBits(8, 8, '')}
TOP1 = 'accuracy/top1'


@pytest.fixture
def model():
    """At 4 bits but for its first layer and its classifier, which are float
    and can be quantized."""
    quantizers = {role: dict(cfg, bits=4) for role, cfg in QUANTIZERS.items()}
    every = dict(layers={'*': 4})
    model = joint_qat(quantizers=quantizers, guidance=None, policy=every)
    for name in ('backbone.conv1', 'head.fc'):
        layer = model.architecture.get_submodule(name)
        layer.weight_quantizer = torch.nn.Identity()
        layer.input_quantizer = torch.nn.Identity()
    model.calibrate(batch(32)[0])
    return model.eval()


def validation(network, count=24):
    images, samples = batch(count, seed=1)
    batches = [(images[i : i + 10], samples[i : i + 10])
               for i in range(0, count, 10)]  # fmt: skip
    evaluator = Evaluator(dict(type='Accuracy', topk=(1,)))
    return Validation(network, batches, evaluator, TOP1)


def test_divergence_of_known_distributions():
    before = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    after = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert divergence(before, after) == pytest.approx(expected / 2)
    assert divergence(after, after) == 0


def test_divergence_of_classes_on_their_own():
    before, after = torch.tensor([[0.5, 0.1]]), torch.tensor([[0.25, 0.1]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert divergence(before, after, several=True) == pytest.approx(expected)
    assert divergence(before, after) != pytest.approx(expected)


def test_certain_scores_give_a_finite_divergence():
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert divergence(one, other) == pytest.approx(12 * math.log(10))


def test_validation_measures_against_the_network_of_the_start(model):
    network = model.architecture
    found = validation(network)
    logits = network(batch(24, seed=1)[0], mode='tensor')
    right = logits.argmax(1) == torch.arange(24) % 10
    assert found.images == 24
    assert found.metrics[TOP1] == pytest.approx(100 * right.float().mean())
    assert found.loss().drop == found.loss().divergence == 0
    with torch.no_grad():
        network.head.fc.bias[3] += 100
    loss = found.loss()
    # whatever the image, the answer is 3, which is right for 3 and 13 and 23
    expected = found.metrics[TOP1] - 100 * 3 / 24
    assert loss.drop == pytest.approx(expected, abs=1e-4)
    assert loss.divergence > 1


def test_only_the_named_layer_has_other_bits_and_only_inside(model):
    network, images = model.architecture, batch(8)[0]
    before = dict(named_quantizers(network))
    logits = network(images, mode='tensor')
    with at_bits(network, LOW | FIRST, QUANTIZERS, images):
        inside = dict(named_quantizers(network))
        assert not uncalibrated(network)
        levels = {c.name: c for c in count_levels(network, images)}
    changed = {n for n, q in inside.items() if before.get(n) is not q}
    roles = 'weight_quantizer', 'input_quantizer'
    assert changed == {f'{n}.{r}' for n in (LOW | FIRST) for r in roles}
    assert levels[f'{NAME}.weight_quantizer'].levels <= 4
    assert levels[f'{NAME}.input_quantizer'].bits == 2
    assert levels['backbone.conv1.weight_quantizer'].bits == 8
    assert dict(named_quantizers(network)) == before
    assert torch.equal(network(images, mode='tensor'), logits)


def test_an_error_inside_leaves_the_network_as_it_was(model):
    network = model.architecture
    before = dict(named_quantizers(network))
    with (
        pytest.raises(ZeroDivisionError),
        at_bits(network, LOW, QUANTIZERS, batch()[0]),
    ):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError):  # in the calibration
        with at_bits(network, LOW, QUANTIZERS, torch.zeros(2, 3, 8, 8)):
            pass
    assert dict(named_quantizers(network)) == before


def test_a_layer_loses_what_a_network_built_that_way_loses(model):
    """Built by its policy, with the same weights and calibration images."""
    network, images = model.architecture, batch(16)[0]
    found = validation(network)
    loss = loss_at(found, QUANTIZERS, images, LOW)
    other = joint_qat(
        quantizers={r: dict(c, bits=4) for r, c in QUANTIZERS.items()},
        guidance=None,
        policy=dict(layers={NAME: 2}),
    )
    state = {
        key: value
        for key, value in network.state_dict().items()
        if not key.startswith(NAME) or 'quantizer' not in key
    }
    other.architecture.load_state_dict(state, strict=False)
    other.eval()
    waiting = uncalibrated(other.architecture)
    assert {name.rpartition('.')[0] for name in waiting} == {NAME}
    with torch.no_grad():
        calibrate(other.architecture, partial(other, images))
    built = validation(other.architecture)
    assert loss.drop == found.metrics[TOP1] - built.metrics[TOP1]
    scores = [
        net(batch(24, seed=1)[0], mode='tensor').softmax(1)
        for net in (network, other.architecture)
    ]
    expected = divergence(*scores)
    assert loss.divergence == pytest.approx(expected, rel=1e-3)
    assert expected > 0


def test_each_layer_at_each_width(model):
    network = model.architecture
    layers = as_they_are(
        network, ['backbone.conv1', NAME], torch.ones(1, *SHAPE)
    )
    assert layers['backbone.conv1'].width.is_float
    assert layers[NAME].width == LayerBits(4, 4, '')
    conv = network.get_submodule(NAME)
    assert layers[NAME].weights == conv.weight.numel() == 4 * 8 * 9
    assert layers[NAME].multiply_adds == 4 * 8 * 9 * 16
    asked = []

    def measure(widths):
        asked.append(widths)
        return len(asked)

    rows = list(sensitivities(layers, [4, 2], QUANTIZERS, measure))
    four, two = LayerBits(4, 4, ''), LayerBits(2, 2, '')
    assert asked == [
        {'backbone.conv1': four}, {'backbone.conv1': two}, {NAME: two}
    ]  # fmt: skip
    assert [(name, c.width) for name, c in rows] == [
        ('backbone.conv1', four), ('backbone.conv1', two),
        (NAME, four), (NAME, two),
    ]  # fmt: skip
    assert rows[2][1].loss.drop == rows[2][1].loss.divergence == 0
    assert rows[3][1].loss == 3
    assert rows[3][1].size == 4 * 8 * 9 // 4


def test_an_operand_that_the_recipe_leaves_float_stays_float():
    quantizers = dict(weight=dict(bits=4), activation=dict(bits=32))
    assert width_at(quantizers, 3) == LayerBits(3, 32, '')
