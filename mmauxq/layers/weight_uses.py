"""Following weights to the convolution and linear products they enter."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, is_tensor_like
from torch.utils.weak import WeakTensorKeyDictionary

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
QUANTIZABLE = (*CONVOLUTIONS, nn.Linear)
PRODUCTS = (F.conv1d, F.conv2d, F.conv3d, F.linear)


class WeightTracer(TorchFunctionMode):
    """While entered, knows of every tensor which weights it was made of.

    A tensor computed from tracked tensors alone is tracked as well: weights
    may be standardised, padded or reshaped on their way into a product. What
    is computed from any other tensor is data.

    Args:
        layers: Name -> layer, whose own parameters are tracked under that
            name, and its constants, such as a bias or a running statistic,
            under none.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._owners = WeakTensorKeyDictionary()
        for name, layer in layers.items():
            for tensor in layer.parameters(recurse=False):
                # vectors are gains and biases: nothing is multiplied by them
                names = frozenset([name] if tensor.dim() > 1 else [])
                self._owners[tensor] = self.owners_of(tensor) | names
            for tensor in layer.buffers(recurse=False):
                self._owners[tensor] = self.owners_of(tensor)

    def owners_of(self, tensor: Any) -> frozenset[str]:
        """Names of the weights that ``tensor`` was made of; none for data."""
        if not isinstance(tensor, Tensor):
            return frozenset()
        return self._owners.get(tensor, frozenset())

    def product(self, multiply: Callable, x: Tensor, weight: Tensor) -> Any:
        """Called in place of ``multiply(x, weight)``."""
        return multiply(x, weight)

    def other(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Called in place of any function that is no product."""
        return func(*args, **kwargs)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        inputs = tensors_in([args, list(kwargs.values())])
        if func in PRODUCTS:
            # both operands may be given by name
            rest = list(args)
            x = rest.pop(0) if rest else kwargs.pop('input')
            weight = rest.pop(0) if rest else kwargs.pop('weight')
            output = self.product(
                lambda x, weight: func(x, weight, *rest, **kwargs), x, weight
            )
        else:
            output = self.other(func, args, kwargs)
        if all(tensor in self._owners for tensor in inputs):
            names = frozenset().union(*map(self.owners_of, inputs))
            for tensor in tensors_in(output):
                self._owners[tensor] = names
        return output


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in any nesting of tuples and lists, in order."""
    if is_tensor_like(value):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for inner in value for tensor in tensors_in(inner)]
    return []


class QuantizeProducts(WeightTracer):
    """While entered, quantizes the products by the weights of ``layers``."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = {str(i): layer for i, layer in enumerate(layers)}
        super().__init__(self.layers)
        self.found = False

    def product(self, multiply: Callable, x: Tensor, weight: Tensor) -> Any:
        names = self.owners_of(weight)
        if len(names) == 1:
            self.found = True
            layer: Any = self.layers[next(iter(names))]
            x = layer.input_quantizer(x)
            weight = layer.weight_quantizer(weight)
        return multiply(x, weight)
