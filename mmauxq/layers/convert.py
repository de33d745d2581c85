"""From a float network to a quantized one, and back."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from mmauxq.errors import UsageError
from mmauxq.quantizers import FLOAT_BITS, Quantizer
from mmauxq.registry import MODELS

from .policy import LayerBits
from .quant_layers import QuantLayer, WeightReader, quant_class
from .weight_uses import CONVOLUTIONS, QUANTIZABLE


@dataclass
class LayerUse:
    """How the weight of a layer is used in a forward pass.

    Args:
        name: Of the module that owns the weight.
        readers: Names of other modules in whose forward a product with the
            weight is computed.
        called: Whether the layer computes a product itself.
        reason: Why it cannot be quantized, or ``''``.
        sample_size: Number of values of one sample in the input; ``None`` if
            axis 0 of the input holds the samples.
    """

    name: str
    readers: list[str] = field(default_factory=list)
    called: bool = False
    reason: str = ''
    sample_size: int | None = None


def is_quantizable(module: nn.Module) -> bool:
    """Whether ``module`` is a float convolution or linear layer."""
    return isinstance(module, QUANTIZABLE) and not isinstance(
        module, QuantLayer
    )


def build_quantizer(
    cfg: dict, role: str, layer: nn.Module, bits: int
) -> nn.Module:
    """A quantizer for one operand of a convolution, linear or attention layer.

    Args:
        cfg: ``type``, ``bits`` (replaced by ``bits``) and,
            optionally, ``per_channel``: one scale for each output channel of
            a weight, or each input channel of an activation.
        role: ``'weight'`` or ``'activation'``.

    Raises:
        UsageError: If the type is unknown, does not serve the role, or has
            no per-channel form.
    """
    if bits == FLOAT_BITS:
        return nn.Identity()
    cfg = dict(cfg, bits=bits, role=role)
    cfg.pop('_scope_', None)
    type_ = cfg.pop('type', None)
    cls = MODELS.get(type_) if isinstance(type_, str) else type_
    if not (inspect.isclass(cls) and issubclass(cls, Quantizer)):
        raise UsageError(
            f'quantizers.{role}.type: expected mmauxq.LSQ, mmauxq.LSQPlus, '
            'mmauxq.PACTActivation, mmauxq.DoReFaActivation, '
            f'mmauxq.DoReFaWeight or mmauxq.L1ScaledWeight, got {type_!r}'
        )
    known = set(inspect.signature(cls).parameters)
    if cfg.pop('per_channel', False):
        if 'num_channels' not in known:
            raise UsageError(
                f'quantizers.{role}: {cls.__name__} has no per-channel form; '
                'remove per_channel'
            )
        cfg['num_channels'], cfg['channel_axis'] = _channels(layer, role)
    unknown = set(cfg) - known
    if unknown:
        raise UsageError(
            f'quantizers.{role}: expected arguments of {cls.__name__}, '
            f'{sorted(known)}, got {sorted(unknown)}'
        )
    return cls(**cfg)


def _channels(layer: nn.Module, role: str) -> tuple[int, int]:
    """Their number, and their axis in the weight or in the input."""
    axis = -1
    if isinstance(layer, nn.MultiheadAttention):
        width_out, width_in = 3 * layer.embed_dim, layer.embed_dim
    elif isinstance(layer, CONVOLUTIONS):
        width_out, width_in, axis = layer.out_channels, layer.in_channels, 1
    else:
        width_out, width_in = layer.out_features, layer.in_features
    return (width_out, 0) if role == 'weight' else (width_in, axis)


def convert(
    model: nn.Module,
    bits: dict[str, LayerBits],
    weight: dict,
    activation: dict,
    uses: dict[str, LayerUse] | None = None,
) -> nn.Module:
    """Quantize the named layers of ``model`` in their place.

    A layer that stands in several places is converted once and stays shared.

    Args:
        model: Changed in place; parameters stay, under the same names.
            Returned, or the quantized layer if it is itself one layer.
        bits: Name of a layer -> its bits; layers not named stay float.
        weight, activation: Configs of the quantizers.
        uses: Name of a layer -> how its weight is used; by default each layer
            computes its own product on samples along axis 0.
    """
    new: dict[nn.Module, nn.Module] = {}
    readers: dict[str, list[str]] = {}
    for name, width in bits.items():
        if width.is_float:
            continue
        layer = model.get_submodule(name)
        of_weight = build_quantizer(weight, 'weight', layer, width.weight)
        of_input = build_quantizer(
            activation, 'activation', layer, width.activation
        )
        if uses and name in uses:
            of_input.sample_size = uses[name].sample_size
            for reader in uses[name].readers:
                readers.setdefault(reader, []).append(name)
        cls = quant_class(type(layer))
        new[layer] = cls.from_float(layer, of_weight, of_input)
    model = _replace(model, new)
    # the innermost first, so that the names above stay valid
    for reader in sorted(readers, key=lambda name: -name.count('.')):
        old = model.get_submodule(reader)
        prefix = f'{reader}.' if reader else ''
        layers = [name.removeprefix(prefix) for name in readers[reader]]
        new = {old: WeightReader.from_float(old, layers)}
        model = _replace(model, new)
    return model


def restore(model: nn.Module, names: Sequence[str] | None = None) -> nn.Module:
    """Undo :func:`convert`, in place, for layers of these names or all: the
    float network, with the trained weights."""
    modules = (
        model.modules() if names is None else map(model.get_submodule, names)
    )
    floats = {
        module: module.to_float()
        for module in modules
        if isinstance(module, (QuantLayer, WeightReader))
    }
    return _replace(model, floats)


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    """``model`` with the keys of ``new`` replaced by their values, wherever
    they stand, also inside of a value."""
    done: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if module not in done:
            done[module] = chosen = new.get(module, module)
            for name, child in list(chosen._modules.items()):
                if child is not None and visit(child) is not child:
                    setattr(chosen, name, visit(child))
        return done[module]

    return visit(model)
