"""A network whose every layer can be given other bits."""

from mmengine.config import Config
from torch import nn

from mmauxq.analysis.sensitivity import set_quantizers, width_at
from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.errors import UsageError
from mmauxq.layers import QuantLayer
from mmauxq.log import quiet_log
from mmauxq.network.checkpoint import check_architecture, meta_of, normalise

from .network import Network, build, check_config, load_network


def load_every_layer(cfg: Config, checkpoint: str) -> Network:
    """Build F with every layer that can be quantized as a quantized one, also
    those that the policy of the config leaves in floating point, and fill it.

    Args:
        cfg: Config of a quantized network.
        checkpoint: File of a float network, of which all layers are float
            then, or of a quantized one, whose layers are as they were trained.

    Raises:
        UsageError: If the config trains no quantized network, or the
            checkpoint is not one of this network.
    """
    check_config(cfg)
    width = width_at(cfg.model.quantizers, 8)
    if width.is_float:
        raise UsageError(
            'model.quantizers: expected bits from 2 to 8 for weights or '
            'activations, got 32 for both'
        )
    content = read_checkpoint(checkpoint)
    state = normalise(content, str(checkpoint))
    trained: nn.Module | None = None
    if any('_quantizer.' in key for key in state):
        trained = load_network(cfg, checkpoint).architecture
    bits = dict(weight=width.weight, activation=width.activation)
    with quiet_log():  # it would tell of bits that no layer has in the end
        algorithm = build(cfg, None, policy=dict(layers={'*': bits}))
    algorithm.cpu().eval()
    for name, layer in algorithm.architecture.named_modules():
        if isinstance(layer, QuantLayer):
            old = None if trained is None else trained.get_submodule(name)
            if isinstance(old, QuantLayer):
                set_quantizers(
                    layer, old.weight_quantizer, old.input_quantizer
                )
            else:
                set_quantizers(layer, nn.Identity(), nn.Identity())
    check_architecture(algorithm.architecture, state, str(checkpoint))
    loaded = algorithm.architecture.load_state_dict(state, strict=False)
    if loaded.unexpected_keys:  # such as of a deeper network
        raise UsageError(
            f'{checkpoint}: expected a checkpoint of this architecture, got '
            f'one that also has {loaded.unexpected_keys[0]}'
        )
    return Network(algorithm, cfg, meta_of(content))
