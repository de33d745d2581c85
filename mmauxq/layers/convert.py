"""From a float network to a quantized one, and back."""

import inspect
from collections.abc import Callable, Sequence
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
        name: Name of the module that owns the weight.
        readers: Names of other modules in whose forward a product with the
            weight is computed; empty if the layer computes it itself.
        called: Whether the layer computes a product itself.
        reason: Why it cannot be quantized, or ``''``.
        sample_size: Number of values of one sample in the input, if axis 0
            of the input does not hold the samples; else ``None``.
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
    """A quantizer for one operand of one layer.

    Args:
        cfg: ``type``, ``bits`` (replaced by ``bits``) and, optionally,
            ``per_channel``: one scale for each output channel of a weight,
            or each input channel of an activation.
        role: ``'weight'`` or ``'activation'``.
        layer: A convolution, linear or attention layer.
        bits: 1 to 8, or 32.

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
            'mmauxq.PACTActivation, mmauxq.DoReFaActivation or '
            f'mmauxq.DoReFaWeight, got {type_!r}'
        )
    known = set(inspect.signature(cls).parameters)
    if cfg.pop('per_channel', False):
        if 'num_channels' not in known:
            raise UsageError(
                f'quantizers.{role}: {cls.__name__} has no per-channel form; '
                'remove per_channel'
            )
        cfg['num_channels'] = _num_channels(layer, role)
        cfg['channel_axis'] = _channel_axis(layer, role)
    unknown = set(cfg) - known
    if unknown:
        raise UsageError(
            f'quantizers.{role}: expected arguments of {cls.__name__}, '
            f'{sorted(known)}, got {sorted(unknown)}'
        )
    return cls(**cfg)


def _num_channels(layer: nn.Module, role: str) -> int:
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim * (3 if role == 'weight' else 1)
    if isinstance(layer, CONVOLUTIONS):
        return layer.out_channels if role == 'weight' else layer.in_channels
    return layer.out_features if role == 'weight' else layer.in_features


def _channel_axis(layer: nn.Module, role: str) -> int:
    if role == 'weight':
        return 0
    return 1 if isinstance(layer, CONVOLUTIONS) else -1


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
        model: Changed in place: named layers are replaced by quantized ones
            that share their parameters, under the same names.
        bits: Name of a layer -> its bits; layers not named stay float.
        weight: Config of the weight quantizer.
        activation: Config of the input quantizer.
        uses: Name of a layer -> how its weight is used; by default each layer
            computes its own product on samples along axis 0.

    Returns:
        ``model``; the quantized layer if ``model`` is itself one layer.
    """
    uses = uses or {}
    modules = dict(model.named_modules(remove_duplicate=False))
    new = {}
    for name, layer_bits in bits.items():
        if layer_bits.is_float:
            continue
        layer = modules[name]
        quantizers = (
            build_quantizer(weight, 'weight', layer, layer_bits.weight),
            build_quantizer(
                activation, 'activation', layer, layer_bits.activation
            ),
        )
        if name in uses:
            quantizers[1].sample_size = uses[name].sample_size
        cls = quant_class(type(layer))
        new[id(layer)] = cls.from_float(layer, *quantizers)
    model = _replace(model, lambda child: new.get(id(child)))
    readers: dict[str, list[str]] = {}
    for name, use in uses.items():
        if name in bits and not bits[name].is_float:
            for reader in use.readers:
                readers.setdefault(reader, []).append(name)
    # the innermost first, so that the names above stay valid
    for reader in sorted(readers, key=lambda name: -name.count('.')):
        old = model.get_submodule(reader)
        prefix = f'{reader}.' if reader else ''
        layers = [name.removeprefix(prefix) for name in readers[reader]]
        by_id = {id(old): WeightReader.from_float(old, layers)}
        model = _replace(
            model, lambda child, by_id=by_id: by_id.get(id(child))
        )
    return model


def restore(model: nn.Module, names: Sequence[str] | None = None) -> nn.Module:
    """Undo :func:`convert`: the float network, with the trained weights.

    Args:
        model: Changed in place.
        names: Only these layers; all if ``None``.
    """
    chosen = None
    if names is not None:
        chosen = {id(model.get_submodule(name)) for name in names}
    memo: dict[int, nn.Module] = {}

    def to_float(child: nn.Module) -> nn.Module | None:
        if not isinstance(child, (QuantLayer, WeightReader)) or (
            chosen is not None and id(child) not in chosen
        ):
            return None
        if id(child) not in memo:
            memo[id(child)] = child.to_float()
        return memo[id(child)]

    return _replace(model, to_float)


def _replace(
    model: nn.Module, choose: Callable[[nn.Module], nn.Module | None]
) -> nn.Module:
    seen = set()
    parents = [model]
    while parents:
        parent = parents.pop()
        if id(parent) in seen:
            continue
        seen.add(id(parent))
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            replacement = choose(child)
            if replacement is not None:
                setattr(parent, name, replacement)
                child = replacement
            # a replacement may have children to replace in turn
            parents.append(child)
    # a model that is one layer has no parent to change
    replacement = choose(model)
    return model if replacement is None else replacement
