"""Following weights to the convolution and linear products they enter."""

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
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
        owners: (parameter or buffer, names of the weights it stands for).
            A constant, such as a bias or a running statistic, has none.
    """

    def __init__(
        self, owners: Iterable[tuple[Tensor, frozenset[str]]]
    ) -> None:
        super().__init__()
        self._owners = WeakTensorKeyDictionary()
        for tensor, names in owners:
            self._owners[tensor] = self.owners_of(tensor) | names

    def owners_of(self, tensor: Any) -> frozenset[str]:
        """Names of the weights that ``tensor`` was made of; none for data."""
        if not isinstance(tensor, Tensor):
            return frozenset()
        return self._owners.get(tensor, frozenset())

    def product(
        self,
        func: Callable,
        x: Tensor,
        weight: Tensor,
        args: tuple,
        kwargs: dict,
    ) -> Any:
        """Called in place of ``func(x, weight, *args, **kwargs)``."""
        return func(x, weight, *args, **kwargs)

    def other(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Called in place of any function that is no product."""
        return func(*args, **kwargs)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        inputs = list(_tensors([args, kwargs]))
        if func in PRODUCTS:
            # both operands may be given by name
            rest = list(args)
            x = rest.pop(0) if rest else kwargs.pop('input')
            weight = rest.pop(0) if rest else kwargs.pop('weight')
            output = self.product(func, x, weight, tuple(rest), kwargs)
        else:
            output = self.other(func, args, kwargs)
        if all(tensor in self._owners for tensor in inputs):
            names = frozenset().union(*map(self.owners_of, inputs))
            for tensor in _tensors(output):
                self._owners[tensor] = names
        return output


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def own_tensors(
    module: nn.Module, name: str
) -> Iterable[tuple[Tensor, frozenset[str]]]:
    """Tensors of ``module`` itself, as :class:`WeightTracer` takes them."""
    for parameter in module.parameters(recurse=False):
        # vectors are gains and biases: nothing is multiplied by them
        yield parameter, frozenset([name] if parameter.dim() > 1 else [])
    for buffer in module.buffers(recurse=False):
        yield buffer, frozenset()


class QuantizeProducts(WeightTracer):
    """While entered, quantizes the products by the weights of ``layers``."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.layers = {str(i): layer for i, layer in enumerate(layers)}
        super().__init__(
            pair
            for name, layer in self.layers.items()
            for pair in own_tensors(layer, name)
        )
        self.found = False

    def product(
        self,
        func: Callable,
        x: Tensor,
        weight: Tensor,
        args: tuple,
        kwargs: dict,
    ) -> Any:
        names = self.owners_of(weight)
        if len(names) == 1:
            self.found = True
            layer: Any = self.layers[next(iter(names))]
            x = layer.input_quantizer(x)
            weight = layer.weight_quantizer(weight)
        return func(x, weight, *args, **kwargs)
