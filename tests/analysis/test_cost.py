from mmengine.model import BaseModule
from mmpretrain.registry import MODELS
from torch import nn

from mmauxq.analysis import deployed_bytes
from mmauxq.layers import restore
from tests.networks import SHAPE, batch, classifier, joint_qat


@MODELS.register_module()
class _Attending(BaseModule):
    """A backbone with a projection that is not a layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(1, 16, 2, 2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        return (tokens.transpose(1, 2).unflatten(2, (4, 4)),)


def test_projections_of_attention_count_at_their_bits():
    config = classifier()
    config['backbone'] = dict(type='_Attending')
    model = joint_qat(architecture=config, guidance=None, input_shape=SHAPE)
    model.loss(*batch())
    attention = model.architecture.backbone.attention
    projections = (
        attention.in_proj_weight.numel() + attention.out_proj.weight.numel()
    )
    assert projections == 4 * 16 * 16
    network = model.architecture
    state = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in network.state_dict().items()
        if 'quantizer' in name
    )
    quantized = deployed_bytes(network)
    floating = deployed_bytes(restore(network))
    # 2 bits instead of 32, and what the quantizers store
    assert floating - quantized == projections * 30 // 8 - state
