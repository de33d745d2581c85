"""A convolution or linear layer whose two operands are quantized."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from mmauxq.errors import UsageError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
QUANTIZABLE = (*CONVOLUTIONS, nn.Linear)
PRODUCTS = (F.conv1d, F.conv2d, F.conv3d, F.linear)
PLAIN = {base.forward for base in QUANTIZABLE} | {
    base._conv_forward for base in CONVOLUTIONS
}


class QuantizedLayer:
    """Mixed into the class of a float layer, which it leaves as it was.

    Parameters keep their names, so that float checkpoints load; what is new
    is ``weight_quantizer`` and ``input_quantizer``. Both act on what enters
    the product itself: after the padding of a padded subclass, after the
    standardisation of a weight-standardised one.
    """

    weight_quantizer: nn.Module
    input_quantizer: nn.Module
    float_type: type

    @property
    def product_weight(self) -> Tensor:
        """The parameter that enters the product."""
        return self.weight  # type: ignore[attr-defined]


class _QuantizedConv(QuantizedLayer):
    def _conv_forward(
        self, input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        return super()._conv_forward(  # type: ignore[misc]
            self.input_quantizer(input), self.weight_quantizer(weight), bias
        )


class _QuantizedLinear(QuantizedLayer):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(
            self.input_quantizer(input),
            self.weight_quantizer(self.weight),
            self.bias,
        )


def multiplies_by_its_weight(module: nn.Module) -> bool:
    """Whether it is a quantized layer whose product is by ``weight`` itself.

    Others pad, standardise or split it before.
    """
    return isinstance(module, (_QuantizedConv, _QuantizedLinear))


class _QuantizeProducts(TorchFunctionMode):
    """Quantizes the operands of every convolution and linear product."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer = layer
        self.found = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in PRODUCTS:
            self.found = True
            # both may come by name; what follows them stays as it is
            rest = list(args)
            x = rest.pop(0) if rest else kwargs.pop('input')
            weight = rest.pop(0) if rest else kwargs.pop('weight')
            return func(
                self.layer.input_quantizer(x),
                self.layer.weight_quantizer(weight),
                *rest,
                **kwargs,
            )
        return func(*args, **kwargs)


class _QuantizedForward(QuantizedLayer):
    """For subclasses that compute in a method of their own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _QuantizeProducts(self) as products:
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not products.found:
            raise UsageError(
                f'{self.float_type.__name__}: its forward calls none of '
                'F.conv1d, F.conv2d, F.conv3d and F.linear, so that nothing '
                'is quantized; keep the layer float with policy.layers'
            )
        return output


class _QuantizedAttention(QuantizedLayer):
    """The three input projections of :class:`torch.nn.MultiheadAttention`.

    ``out_proj`` is a layer of its own, quantized like any other. The product
    of queries and keys, and that of scores and values, stay in floating
    point: no weight takes part in them.
    """

    @property
    def product_weight(self) -> Tensor:
        return self.in_proj_weight  # type: ignore[attr-defined]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple:
        weight = self.weight_quantizer(self.in_proj_weight)
        bias = self.in_proj_bias
        if query is key and key is value:
            x = self.input_quantizer(query)
            return F.linear(x, weight, bias).chunk(3, -1)
        # one quantizer for all: it must see them together
        parts = (query, key, value)
        sizes = [part.shape[:-1].numel() for part in parts]
        flat = [part.reshape(-1, part.shape[-1]) for part in parts]
        flat = self.input_quantizer(torch.cat(flat)).split(sizes)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(
            F.linear(x.view(part.shape), w, b)
            for x, part, w, b in zip(
                flat, parts, weight.chunk(3), biases, strict=True
            )
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
        """As of :class:`torch.nn.MultiheadAttention`."""
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
        x = x.transpose(-3, -2).flatten(-2)
        x = self.out_proj(x)
        if not self.batch_first and x.dim() == 3:
            x = x.transpose(0, 1)
        return x, weights


def _additive_mask(
    attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """Both masks of attention as one that is added to the scores."""

    def additive(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(
            mask, float('-inf')
        )

    mask = None
    if attn_mask is not None:
        mask = additive(attn_mask)
        if mask.dim() == 3 and q.dim() == 4:  # (N * heads, L, S)
            mask = mask.view(*q.shape[:2], q.shape[-2], k.shape[-2])
    if padding is not None:
        padding = additive(padding)[..., None, None, :]
        mask = padding if mask is None else mask + padding
    return mask


def is_plain_attention(module: nn.MultiheadAttention) -> bool:
    """Whether its projections are one weight and nothing is appended."""
    return (
        module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
    )


class _ReadWeights(TorchFunctionMode):
    """Quantizes products whose weight is, or is made from, that of a layer.

    Args:
        layers: Quantized layers whose own forward is not called.
    """

    def __init__(self, layers: Sequence[QuantizedLayer]) -> None:
        super().__init__()
        self.layers = {id(layer): layer for layer in layers}
        self.origin = WeakTensorKeyDictionary()
        for layer in layers:
            self.origin[layer.product_weight] = id(layer)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in PRODUCTS:
            rest = list(args)
            x = rest.pop(0) if rest else kwargs.pop('input')
            weight = rest.pop(0) if rest else kwargs.pop('weight')
            layer = self.layers.get(self.origin.get(weight))
            if layer is not None:
                x = layer.input_quantizer(x)
                weight = layer.weight_quantizer(weight)
            return func(x, weight, *rest, **kwargs)
        output = func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, (tuple, list)) and first:
            first = first[0]
        if isinstance(first, Tensor) and first in self.origin:
            for value in output if isinstance(output, tuple) else (output,):
                if isinstance(value, Tensor) and value is not first:
                    self.origin[value] = self.origin[first]
        return output


class WeightReader:
    """Mixed into the class of a module that multiplies by others' weights.

    ``self.qkv`` may be a layer that is never called, while the forward of the
    module that holds it computes ``F.linear(x, self.qkv.weight, bias)``. The
    operands of that product are quantized by the quantizers of ``qkv``.
    """

    float_type: type
    read_layers: tuple[str, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the class it is mixed into."""
        layers = [
            self.get_submodule(name)  # type: ignore[attr-defined]
            for name in self.read_layers
        ]
        with _ReadWeights(
            [layer for layer in layers if isinstance(layer, QuantizedLayer)]
        ):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def _reader_type(cls: type, layers: tuple[str, ...]) -> type:
    return type(
        f'Reader{cls.__name__}',
        (WeightReader, cls),
        {'float_type': cls, 'read_layers': layers, '__module__': __name__},
    )


def quantize_reader(module: nn.Module, layers: Sequence[str]) -> nn.Module:
    """``module`` with quantized products by the weights of ``layers``.

    Args:
        module: Computes products with weights that it does not own; its own
            attributes stay shared.
        layers: Names, relative to ``module``, of layers that are quantized
            (or will be) and whose weights it reads.
    """
    return _as_type(module, _reader_type(type(module), tuple(layers)))


def restore_reader(module: nn.Module) -> nn.Module:
    """The module that was given to :func:`quantize_reader`."""
    return _as_type(module, module.float_type)


@functools.cache
def _quantized_type(cls: type) -> type:
    """The class of ``cls`` layers with quantized operands."""
    if issubclass(cls, nn.MultiheadAttention):
        return type(
            f'Quantized{cls.__name__}',
            (_QuantizedAttention, cls),
            {'float_type': cls, '__module__': __name__},
        )
    methods = [cls.forward, getattr(cls, '_conv_forward', cls.forward)]
    if not PLAIN.issuperset(methods):
        mixin: type = _QuantizedForward
    elif issubclass(cls, nn.Linear):
        mixin = _QuantizedLinear
    else:
        mixin = _QuantizedConv
    return type(
        f'Quantized{cls.__name__}',
        (mixin, cls),
        {'float_type': cls, '__module__': __name__},
    )


def _as_type(layer: nn.Module, cls: type) -> nn.Module:
    """A shallow copy of ``layer`` with class ``cls`` and the same tensors."""
    new = cls.__new__(cls)
    new.__dict__.update(layer.__dict__)
    for name in ('_parameters', '_buffers', '_modules'):
        new.__dict__[name] = dict(layer.__dict__[name])
    return new


def quantize_layer(
    layer: nn.Module, weight_quantizer: nn.Module, input_quantizer: nn.Module
) -> nn.Module:
    """``layer`` with quantized operands; shares its parameters.

    Args:
        layer: Of (a subclass of) Conv1d, Conv2d, Conv3d or Linear; unchanged.
            Of a MultiheadAttention, the input projections are quantized.
        weight_quantizer: Called with the weight, (out, in, ...).
        input_quantizer: Called with the input, (N, ...).

    Returns:
        An instance of a class derived from that of ``layer``.

    Raises:
        TypeError: If ``layer`` is no such layer, or is quantized already.
    """
    allowed = (*QUANTIZABLE, nn.MultiheadAttention)
    if isinstance(layer, QuantizedLayer) or not isinstance(layer, allowed):
        raise TypeError(
            f'cannot quantize a {type(layer).__name__}; allowed '
            'are float Conv1d, Conv2d, Conv3d and Linear'
        )
    new = _as_type(layer, _quantized_type(type(layer)))
    new.weight_quantizer = weight_quantizer
    new.input_quantizer = input_quantizer
    return new


def restore_layer(layer: nn.Module) -> nn.Module:
    """The float layer that was given to :func:`quantize_layer`."""
    if not isinstance(layer, QuantizedLayer):
        raise TypeError(f'{type(layer).__name__} is not quantized')
    new = _as_type(layer, layer.float_type)
    del new._modules['weight_quantizer'], new._modules['input_quantizer']
    return new
