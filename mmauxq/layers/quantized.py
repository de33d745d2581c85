"""A convolution or linear layer whose two operands are quantized."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
QUANTIZABLE = (*CONVOLUTIONS, nn.Linear)
PRODUCTS = (F.conv1d, F.conv2d, F.conv3d, F.linear)


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


class _QuantizeProducts(TorchFunctionMode):
    """Quantizes the operands of every convolution and linear product."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in PRODUCTS:
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
    """For subclasses that compute in a ``forward`` of their own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _QuantizeProducts(self):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def _quantized_type(cls: type) -> type:
    """The class of ``cls`` layers with quantized operands."""
    plain = {base.forward for base in QUANTIZABLE}
    if cls.forward not in plain:
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
        weight_quantizer: Called with the weight, (out, in, ...).
        input_quantizer: Called with the input, (N, ...).

    Returns:
        An instance of a class derived from that of ``layer``.

    Raises:
        TypeError: If ``layer`` is no such layer, or is quantized already.
    """
    if isinstance(layer, QuantizedLayer) or not isinstance(layer, QUANTIZABLE):
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


def quantized_weight(layer: nn.Module) -> Tensor:
    """The weight as the product sees it, without a gradient."""
    with torch.no_grad():
        return layer.weight_quantizer(layer.weight)
