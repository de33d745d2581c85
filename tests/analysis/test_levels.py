import pytest
import torch

from mmauxq.analysis import count_levels, deployed_bytes
from mmauxq.forward_hooks import forward_hooks
from mmauxq.layers import restore
from tests.networks import batch, joint_qat


def quantizers(bits, kind='mmauxq.LSQ', **weight):
    return dict(
        weight=dict(type='mmauxq.LSQ', bits=bits, **weight),
        activation=dict(type=kind, bits=bits),
    )


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize(
    'kind', ['LSQ', 'LSQPlus', 'PACTActivation', 'DoReFaActivation']
)
def test_no_tensor_of_a_network_has_more_levels_than_its_bits(bits, kind):
    model = joint_qat(
        quantizers=quantizers(bits, f'mmauxq.{kind}', per_channel=True)
    )
    model.loss(*batch())
    model.eval()
    audit = count_levels(model, batch(seed=1)[0])
    assert len(audit) == 2 * 8
    assert all(count.holds and count.levels > 1 for count in audit), audit


def test_a_wide_tensor_is_found():
    model = joint_qat()
    model.loss(*batch())
    model.eval()
    conv = model.architecture.backbone.layer1[0].conv1
    conv.input_quantizer.register_forward_hook(
        lambda module, args, output: output + args[0]
    )
    broken = [c for c in count_levels(model, batch()[0]) if not c.holds]
    assert [c.name for c in broken] == [
        'architecture.backbone.layer1.0.conv1.input_quantizer'
    ]


def test_operand_values_are_multiples_of_the_step():
    model = joint_qat()
    model.loss(*batch())
    model.eval()
    quantizer = model.architecture.backbone.layer2[0].conv2.weight_quantizer
    values = []
    with forward_hooks(
        [('', quantizer)], lambda name, _, x, y: values.append(y.detach())
    ):
        model(batch()[0])
    codes = values[0] / quantizer.step.item()
    torch.testing.assert_close(codes, codes.round())
    assert codes.min() >= -2 and codes.max() <= 1


def test_deployed_bytes():
    model = joint_qat().architecture
    weights = sum(
        m.weight.numel()
        for m in model.modules()
        if hasattr(m, 'weight_quantizer')
    )
    scales = sum(
        p.numel() for n, p in model.named_parameters() if 'quantizer' in n
    )
    flags = sum(
        b.numel() for n, b in model.named_buffers() if 'quantizer' in n
    )
    quantized = deployed_bytes(model)
    floating = deployed_bytes(restore(model))
    # 2 bits instead of 32; a step and two flags for each quantizer
    assert floating - quantized == 4 * weights - weights // 4 - (
        4 * scales + flags
    )
