"""Which layer gets how many bits."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from mmauxq.errors import UsageError
from mmauxq.quantizers import FLOAT_BITS
from mmauxq.quantizers.base import ROLES, check_bits


@dataclass(frozen=True)
class LayerBits:
    """Bits of the two operands of one layer, and the reason."""

    weight: int
    activation: int
    reason: str

    @property
    def is_float(self) -> bool:
        """Whether the layer stays in floating point."""
        return self.weight == self.activation == FLOAT_BITS


def match(pattern: str, names: Sequence[str], what: str) -> list[str]:
    """The names that a shell pattern matches, in their order; a UsageError
    that lists what exists if there is none."""
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        shown = ', '.join(names[:20]) + (', ...' if len(names) > 20 else '')
        raise UsageError(
            f'{what}: expected a pattern of names, got {pattern!r}, which '
            f'matches nothing; there are {len(names)}: {shown}'
        )
    return found


@dataclass
class Policy:
    """Bits per layer, by role and by name.

    The first layer that runs and the classifier stay in floating point unless
    told otherwise, as in the auxiliary module's paper and most of the field.

    Args:
        first: Bits of the first layer that runs; 8 and 32 are usual.
        last: Bits of the classifier: the layers of the architecture's head,
            or the last layer that runs if the head has none.
        layers: Shell pattern of layer names -> bits, or
            ``dict(weight=..., activation=...)``; the last match wins, also
            over ``first`` and ``last``. On the command line, where a key
            cannot have dots, a list of pairs: ``"[(backbone.layer1.*,8)]"``.
    """

    first: int = FLOAT_BITS
    last: int = FLOAT_BITS
    layers: dict | Sequence = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_bits(self.first, 'policy.first')
        check_bits(self.last, 'policy.last')
        if not isinstance(self.layers, dict):
            try:
                pairs = [(str(name), bits) for name, bits in self.layers]
            except (TypeError, ValueError):
                raise UsageError(
                    'policy.layers: expected a dict or a list of pairs, '
                    f'pattern of layer names and bits, got {self.layers!r}'
                ) from None
            self.layers = dict(pairs)
        for pattern, bits in self.layers.items():
            where = f'policy.layers[{pattern!r}]'
            bits = _by_role(bits)
            if not bits or set(bits) - set(ROLES):
                raise UsageError(
                    f"{where}: expected the keys 'weight' and "
                    f"'activation', got {bits}"
                )
            for role, value in bits.items():
                check_bits(value, where, role)

    def assign(
        self, names: Sequence[str], weight: int, activation: int
    ) -> dict[str, LayerBits]:
        """Bits of every layer of ``names``, which are in the order of running,
        from those by default; a UsageError if a pattern matches none."""
        bits = {name: LayerBits(weight, activation, '') for name in names}
        head = [name for name in names if name.split('.')[0] == 'head']
        for name in head or names[-1:]:
            bits[name] = LayerBits(self.last, self.last, 'classifier')
        bits[names[0]] = LayerBits(self.first, self.first, 'first layer')
        for pattern, value in self.layers.items():
            value = _by_role(value)
            for name in match(pattern, list(names), 'model.policy.layers'):
                bits[name] = LayerBits(
                    value.get('weight', bits[name].weight),
                    value.get('activation', bits[name].activation),
                    f'policy {pattern!r}',
                )
        return bits


def _by_role(bits: Any) -> dict:
    return dict(bits if isinstance(bits, dict) else dict.fromkeys(ROLES, bits))
