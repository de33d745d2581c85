"""What a recorded step holds fixed of a model."""

from torch import nn


class Watched:
    """What a recording holds fixed of a model, and a hook may change.

    The lists are collected once, because this is asked in every step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.tables = [
            table
            for module in self.modules
            for table in (module._parameters, module._buffers)
            if table
        ]
        self.children = [m._modules for m in self.modules if m._modules]
        self.known = self._children()
        self.numbers = [
            (module.__dict__, name)
            for module in self.modules
            for name, value in module.__dict__.items()
            if _is_number(value, name)
        ]
        self.hooks = hooks_of(model)

    def _children(self) -> list:
        return [id(c) for table in self.children for c in table.values()]

    def is_outdated(self) -> bool:
        """Whether a module was added, removed or replaced."""
        return self._children() != self.known

    def state(self) -> tuple:
        """Equal for two steps if a recording of one is right for the other."""
        return (
            self.known,
            [module.training for module in self.modules],
            [
                t is not None and (t.data_ptr(), t.requires_grad)
                for table in self.tables
                for t in table.values()
            ],
            [
                tuple(value) if isinstance(value, list) else value
                for table, name in self.numbers
                for value in (table.get(name),)
            ],
        )

    def counts(self) -> list[tuple[int, str, object]]:
        """Numbers that modules keep on the host, and may count with."""
        return [
            (i, name, value)
            for i, module in enumerate(self.modules)
            for name, value in module.__dict__.items()
            if isinstance(value, (int, float))
        ]


def hooks_of(model: nn.Module) -> list[tuple[str, dict]]:
    """(name of an inner module, one of its tables of hooks) pairs.

    Hooks of ``model`` itself are called around a step, not inside of it.
    """
    return [
        (name, table)
        for name, module in model.named_modules()
        if name
        for table in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_pre_hooks,
            module._backward_hooks,
        )
    ]


def hooked(hooks: list[tuple[str, dict]]) -> str | None:
    """Name of a module that has a hook now; ``None`` if there is none."""
    return next((name for name, table in hooks if table), None)


def _is_number(value: object, name: str) -> bool:
    """Floats and lists of floats, and the bits of a quantizer."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(v, float) for v in value)
    return isinstance(value, float) or name == 'bits'
