"""Convolution, linear and attention layers with quantized operands."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmauxq.errors import UsageError

from .weight_uses import CONVOLUTIONS, QUANTIZABLE, QuantizeProducts

EMPTY_INPUTS = 'mmcv.cnn.bricks.wrappers'
"""Its classes are torch's, which take empty inputs on an old torch, too."""
STANDARD_FORWARDS = {base.forward for base in QUANTIZABLE} | {
    base._conv_forward for base in CONVOLUTIONS
}


class QuantLayer(nn.Module):
    """Base of all quantized layers; made from, and back into, a float layer.

    A quantized layer is also an instance of ``float_type``, the class of its
    float layer. Parameters keep their names, so that float checkpoints load.
    Both quantizers act on what enters the product: after the padding of a
    padded subclass, after the standardisation of a weight-standardised one.

    Attributes:
        multiplies_by_weight: Whether the second operand is ``weight`` itself.
        precomputed: Called with the weight; returns it quantized, if that was
            done for many layers at once, or ``None``.
    """

    weight_quantizer: nn.Module
    input_quantizer: nn.Module
    float_type: type[nn.Module]
    multiplies_by_weight = False
    precomputed: Callable[[Tensor], Tensor | None] | None = None

    @classmethod
    def from_float(
        cls,
        layer: nn.Module,
        weight_quantizer: nn.Module,
        input_quantizer: nn.Module,
    ) -> 'QuantLayer':
        """A quantized layer that shares the parameters of ``layer``, which is
        not changed. The quantizers are called with the weight (out, in, ...)
        and the input (N, ...)."""
        new = _with_class(layer, cls)
        new.weight_quantizer = weight_quantizer
        new.input_quantizer = input_quantizer
        return new

    def to_float(self) -> nn.Module:
        """The float layer, with the trained weights."""
        layer = _with_class(self, self.float_type)
        del layer.weight_quantizer, layer.input_quantizer
        layer.__dict__.pop('precomputed', None)
        return layer

    @property
    def product_weight(self) -> nn.Parameter:
        """The parameter that is quantized."""
        return self.weight  # type: ignore[return-value]

    def quantized_weight(self, weight: Tensor) -> Tensor:
        """``weight`` as it enters the product."""
        done = None if self.precomputed is None else self.precomputed(weight)
        return self.weight_quantizer(weight) if done is None else done

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The classes of foreign layers are made on demand, and what was
        # precomputed belongs to the step at hand.
        state = {k: v for k, v in self.__dict__.items() if k != 'precomputed'}
        return _empty, (quant_class, self.float_type), state


class _QuantConv(QuantLayer):
    multiplies_by_weight = True

    def _conv_forward(
        self, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        return super()._conv_forward(  # type: ignore[misc]
            self.input_quantizer(input), self.quantized_weight(weight), bias
        )


class QuantConv1d(_QuantConv, nn.Conv1d):
    """Conv1d with quantized input and weight."""

    float_type = nn.Conv1d


class QuantConv2d(_QuantConv, nn.Conv2d):
    """Conv2d with quantized input and weight."""

    float_type = nn.Conv2d


class QuantConv3d(_QuantConv, nn.Conv3d):
    """Conv3d with quantized input and weight."""

    float_type = nn.Conv3d


class QuantLinear(QuantLayer, nn.Linear):
    """Linear with quantized input and weight."""

    float_type = nn.Linear
    multiplies_by_weight = True

    def forward(self, input: Tensor) -> Tensor:
        """(N, ..., in_features) to (N, ..., out_features)."""
        return F.linear(
            self.input_quantizer(input),
            self.quantized_weight(self.weight),
            self.bias,
        )


class _QuantForeign(QuantLayer):
    """For subclasses that compute in a method of their own."""

    # a compiler cannot follow the tensors that a mode keeps
    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with QuantizeProducts([self]) as products:
            output = super().forward(*args, **kwargs)
        if not products.found:
            raise UsageError(
                f'{self.float_type.__name__}: expected a forward that calls '
                'F.conv1d, F.conv2d, F.conv3d or F.linear with its weight, '
                'found none; keep the layer float with policy.layers'
            )
        return output


class QuantMultiheadAttention(QuantLayer, nn.MultiheadAttention):
    """MultiheadAttention with quantized input projections.

    ``out_proj`` is a layer of its own, quantized like any other. The product
    of queries and keys, and that of scores and values, stay in floating
    point: no weight takes part in them.
    """

    float_type = nn.MultiheadAttention

    @property
    def product_weight(self) -> nn.Parameter:
        """The projections of queries, keys and values, (3 E, E)."""
        return self.in_proj_weight

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple:
        weight = self.weight_quantizer(self.in_proj_weight)
        bias = self.in_proj_bias
        if query is key and key is value:
            x = self.input_quantizer(query)
            return F.linear(x, weight, bias).chunk(3, -1)
        # one quantizer for all three: it must see them together
        parts = (query, key, value)
        flat = [part.reshape(-1, part.shape[-1]) for part in parts]
        sizes = list(map(len, flat))
        flat = self.input_quantizer(torch.cat(flat)).split(sizes)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        each = zip(flat, parts, weight.chunk(3), biases, strict=True)
        return tuple(
            F.linear(x.view(part.shape), w, b) for x, part, w, b in each
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and result of :class:`torch.nn.MultiheadAttention`."""
        projected = self._project(query, key, value)
        if not self.batch_first and query.dim() == 3:
            projected = tuple(x.transpose(0, 1) for x in projected)
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for x in projected
        )  # (N, heads, L, head_dim)
        mask = _additive_mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            if mask is not None:
                scores = scores + mask
            weights = scores.softmax(-1)
            if dropout:
                weights = F.dropout(weights, dropout)
            x = weights @ v
            if average_attn_weights:
                weights = weights.mean(-3)
        else:
            x = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        x = self.out_proj(x.transpose(-3, -2).flatten(-2))
        if not self.batch_first and x.dim() == 3:
            x = x.transpose(0, 1)
        return x, weights


def _additive_mask(
    attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """Both masks of attention as one that is added to the scores."""
    if attn_mask is not None and attn_mask.dim() == 3 and q.dim() == 4:
        # (N * heads, L, S)
        attn_mask = attn_mask.view(*q.shape[:2], q.shape[-2], k.shape[-2])
    if padding is not None:
        padding = padding[..., None, None, :]
    masks = [
        torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float('-inf'))
        if mask.dtype == torch.bool
        else mask
        for mask in (attn_mask, padding)
        if mask is not None
    ]
    return sum(masks[1:], masks[0]) if masks else None


def is_plain_attention(module: nn.MultiheadAttention) -> bool:
    """Whether :class:`QuantMultiheadAttention` computes what ``module`` does:
    one weight projects, keys and values are as given, the forward is torch's.
    """
    return (
        module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
        and type(module).forward is nn.MultiheadAttention.forward
    )


class WeightReader(nn.Module):
    """Base of modules that multiply by the weights of layers inside of them.

    The layer ``self.qkv`` may never be called, while the forward of its owner
    computes ``F.linear(x, self.qkv.weight, bias)``. The quantizers of ``qkv``
    quantize the operands of that product; ``read_layers`` holds the names of
    such layers, relative to this module.
    """

    float_type: type[nn.Module]
    read_layers: tuple[str, ...] = ()

    @staticmethod
    def from_float(
        module: nn.Module, read_layers: Sequence[str]
    ) -> 'WeightReader':
        """``module`` with quantized products; attributes stay shared."""
        new = _with_class(module, _reader_class(type(module)))
        new.read_layers = tuple(read_layers)
        return new

    def to_float(self) -> nn.Module:
        """The module that was given to :meth:`from_float`."""
        module = _with_class(self, self.float_type)
        del module.read_layers
        return module

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result of ``float_type``."""
        layers = map(self.get_submodule, self.read_layers)
        with QuantizeProducts(x for x in layers if isinstance(x, QuantLayer)):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _empty, (_reader_class, self.float_type), self.__dict__


@functools.cache
def quant_class(float_type: type[nn.Module]) -> type[QuantLayer]:
    """The class of quantized layers of a class of float ones: Conv1d, Conv2d,
    Conv3d, Linear, MultiheadAttention or a subclass; else a TypeError."""
    known = (*QUANTIZABLE, nn.MultiheadAttention)
    if issubclass(float_type, QuantLayer) or not issubclass(float_type, known):
        raise TypeError(
            'expected a float Conv1d, Conv2d, Conv3d, Linear or '
            f'MultiheadAttention, got {float_type.__name__}'
        )
    for cls in (QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear,
                QuantMultiheadAttention):  # fmt: skip
        if cls.float_type is float_type:
            return cls
    forward = float_type.forward
    inner = getattr(float_type, '_conv_forward', forward)
    base: type = QuantLinear
    if issubclass(float_type, nn.MultiheadAttention):
        base = QuantMultiheadAttention
    elif (
        not {forward, inner} <= STANDARD_FORWARDS
        and float_type.__module__ != EMPTY_INPUTS
    ):
        base = _QuantForeign
    elif issubclass(float_type, CONVOLUTIONS):
        base = _QuantConv
    return _subclass('Quant', base, float_type)


@functools.cache
def _subclass(prefix: str, base: type, float_type: type) -> type:
    attributes = {'float_type': float_type, '__module__': __name__}
    name = f'{prefix}{float_type.__name__}'
    return type(name, (base, float_type), attributes)


_reader_class = functools.partial(_subclass, 'Reader', WeightReader)


def _empty(class_of: Callable[[type], type], float_type: type) -> nn.Module:
    cls = class_of(float_type)
    return cls.__new__(cls)


def _with_class(module: nn.Module, cls: type) -> Any:
    """A copy of ``module`` of class ``cls`` with the same tensors and
    children, and with hooks of its own."""
    new = cls.__new__(cls)
    new.__dict__.update({
        name: copy.copy(value) if isinstance(value, (dict, set)) else value
        for name, value in module.__dict__.items()
    })  # fmt: skip
    return new
