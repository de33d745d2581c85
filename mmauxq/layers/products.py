"""Which convolution and linear products a network computes, and with what."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .quantized import PRODUCTS, QUANTIZABLE, is_plain_attention

OTHER_PRODUCTS = {
    torch.matmul: 'matmul',
    torch.mm: 'matmul',
    torch.bmm: 'matmul',
    torch.einsum: 'einsum',
    torch.addmm: 'matmul',
    torch.baddbmm: 'matmul',
    torch.bilinear: 'bilinear',
    Tensor.matmul: 'matmul',
    Tensor.__matmul__: 'matmul',
    Tensor.__rmatmul__: 'matmul',
    F.conv_transpose1d: 'conv_transpose1d',
    F.conv_transpose2d: 'conv_transpose2d',
    F.conv_transpose3d: 'conv_transpose3d',
}


@dataclass
class Product:
    """A layer whose weight enters a product.

    Args:
        name: Of the module that owns the weight.
        readers: Names of the modules, other than that one, in whose forward
            the product is computed; empty if the layer computes it itself.
        called: Whether the layer (also) computes it itself.
        reason: Why it cannot be quantized, or ``''``.
    """

    name: str
    readers: list[str] = field(default_factory=list)
    called: bool = False
    reason: str = ''


def from_weights(
    origin: WeakTensorKeyDictionary, args: Any, kwargs: Any
) -> frozenset | None:
    """The names of what all tensors among the arguments were made of.

    Args:
        origin: Tensor -> names of the weights that it was computed from.

    Returns:
        ``None`` if one of them is not known to come from weights: it is data.
    """
    names: frozenset = frozenset()
    stack = [*args, *(kwargs or {}).values()]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            if value not in origin:
                return None
            names |= origin[value]
        elif isinstance(value, (list, tuple)):
            stack.extend(value)
    return names


def remember(
    origin: WeakTensorKeyDictionary, value: Any, names: frozenset
) -> None:
    """Note that the tensors in ``value`` were made of ``names``."""
    if isinstance(value, Tensor):
        origin[value] = names
    elif isinstance(value, (list, tuple)):
        for inner in value:
            remember(origin, inner, names)


class ProductTrace(TorchFunctionMode):
    """Follows every weight from its module to the products that it enters.

    A product is a call of ``F.conv1d``, ``F.conv2d``, ``F.conv3d`` or
    ``F.linear``, or the attention of :class:`torch.nn.MultiheadAttention`,
    wherever it is made: in the layer, or in a module that reads the weight
    of the layer, as it is or standardised, padded, reshaped on the way.

    Attributes:
        products: Name of a layer -> what became of its weight, in the order
            of running.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.products: dict[str, Product] = {}
        self._names = {id(m): n for n, m in model.named_modules()}
        self._modules = dict(model.named_modules())
        self._stack: list[nn.Module] = []
        self._origin = WeakTensorKeyDictionary()
        for name, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                # vectors are gains and biases: no one multiplies by them
                matrix = parameter.dim() > 1
                self._origin[parameter] = self._origin.get(
                    parameter, frozenset()
                ) | (frozenset([(name, key)]) if matrix else frozenset())
            for buffer in module.buffers(recurse=False):
                self._origin[buffer] = frozenset()

    @contextmanager
    def following(self, model: nn.Module) -> Iterator['ProductTrace']:
        """Trace what ``model`` computes inside."""
        handles = []
        for module in model.modules():
            handles += [
                module.register_forward_pre_hook(
                    lambda module, args: self._stack.append(module)
                ),
                module.register_forward_hook(
                    lambda module, args, output: self._leave(module),
                    always_call=True,
                ),
            ]
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, module: nn.Module) -> None:
        while self._stack and self._stack.pop() is not module:
            pass

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            given = list(args) + [kwargs.get('weight')]
            weight = kwargs['weight'] if 'weight' in kwargs else given[1]
            self._product(self._origin.get(weight))
        elif func is F.multi_head_attention_forward:
            self._attention()
        elif func in OTHER_PRODUCTS:
            self._other(OTHER_PRODUCTS[func], args)
        output = func(*args, **kwargs)
        names = from_weights(self._origin, args, kwargs)
        if names is not None:
            remember(self._origin, output, names)
        return output

    def _name(self, module: nn.Module) -> str:
        return self._names.get(id(module), '?')

    def _product(self, origin: frozenset | None) -> None:
        if not origin or not self._stack:
            return  # both operands are data
        here = self._stack[-1]
        name = self._name(here)
        owners = sorted({owner for owner, _ in origin})
        if isinstance(here, QUANTIZABLE) and name in owners:
            self._note(name).called = True
            return
        owner = owners[0]
        entry = self._note(owner)
        if len(owners) > 1:
            for other in owners:
                self._note(other).reason = (
                    f'{name or "the model"} multiplies by a mixture of it '
                    'and other weights'
                )
        elif not isinstance(self._modules[owner], QUANTIZABLE):
            entry.reason = 'its weight is a parameter of its own, in no layer'
        elif not owner.startswith(f'{name}.' if name else ''):
            entry.reason = f'its weight is read by {name}, outside of it'
        elif name not in entry.readers:
            entry.readers.append(name)

    def _attention(self) -> None:
        here = self._stack[-1] if self._stack else None
        if not isinstance(here, nn.MultiheadAttention):
            return
        name = self._name(here)
        for part in (name, f'{name}.out_proj'):
            entry = self._note(part)
            entry.called = True
            if not is_plain_attention(here):
                entry.reason = (
                    'attention with separate or extra keys and values'
                )

    def _other(self, kind: str, args: Any) -> None:
        for value in args:
            if isinstance(value, Tensor) and value in self._origin:
                for owner, _ in self._origin[value]:
                    if isinstance(self._modules[owner], QUANTIZABLE):
                        entry = self._note(owner)
                        if not entry.called and not entry.readers:
                            entry.reason = f'its weight enters a {kind}'

    def _note(self, name: str) -> Product:
        return self.products.setdefault(name, Product(name))
