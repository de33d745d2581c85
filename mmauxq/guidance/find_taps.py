"""Finding where guidance reads a network, from a training pass."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress, pairwise

from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.layers import is_quantizable
from mmauxq.layers.policy import match
from mmauxq.network import TrainingPass

from .taps import STEM, Tap, TapRecorder, check_tap, layout_of, parts_by_name

AUTO = 'auto'
STAGE_ENDS = 'stage_ends'
LISTS = (nn.Sequential, nn.ModuleList)


@dataclass
class Taps:
    """Where a network is read.

    Args:
        taps: In the order of running, the stem first if it is read.
        overwritten: Names of taps that a later operation overwrites.
        parts: Name of a module, or the stem -> which of its tensors are read.
    """

    taps: list[Tap] = field(default_factory=list)
    overwritten: list[str] = field(default_factory=list)
    parts: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def recorder(
        self, model: nn.Module, with_grad: bool = True
    ) -> TapRecorder:
        """A recorder of these taps in ``model``."""
        names, stem = [n for n in self.parts if n != STEM], STEM in self.parts
        return TapRecorder(
            model, names, stem, self.overwritten, self.parts, with_grad
        )


def find_taps(
    run: TrainingPass,
    taps: str | Sequence[str],
    stem: bool = False,
    place: str = 'guidance.taps',
) -> Taps:
    """Find where to read a network.

    Args:
        run: A training pass of the network, a float image classifier.
        taps: Shell patterns of module names, or ``'auto'``: the repeated
            blocks of the backbone; else the layers that stand in its lists;
            else its children. Modules that return no feature map or tokens,
            or send back no gradient, are passed over. ``'stage_ends'``: of
            these, the last before each change of shape.
        stem: Whether to read the input of the first module too, unless it is
            the image.
        place: The config key of ``taps``, for messages.
    """
    if taps in (AUTO, STAGE_ENDS):
        chosen = _auto(run)
    else:
        chosen = resolve_taps(run.model, taps, place)
        for name in chosen:
            if name not in run.calls:
                raise UsageError(
                    f'{place}: {name} did not run in a forward pass'
                )
            call, features = run.calls[name], run.features(name)
            check_tap(place, name, call.kind, call.grad, bool(features))
    names = [name for name in run.calls if name in set(chosen)]
    if taps == STAGE_ENDS:
        names = _stage_ends(names, run)
    found, reads = Taps(), []
    if stem:
        arguments, versions = run.first_inputs[names[0]]
        features = _stem_features(arguments, run)
        if features:
            reads.append((STEM, features, sum(arguments, []), versions))
    for name in names:
        call = run.calls[name]
        reads.append((name, run.features(name), call.outputs, call.versions))
    for name, parts, tensors, versions in reads:
        found.parts[name] = tuple(parts)
        for key, i in parts_by_name(name, parts).items():
            shape = tuple(tensors[i].shape[1:])
            layout = layout_of(shape, run.images.shape[1:])
            found.taps.append(Tap(key, shape, layout))
            if tensors[i]._version != versions[i]:
                found.overwritten.append(key)
    return found


def _stem_features(
    arguments: Sequence[Sequence[Tensor]], run: TrainingPass
) -> list[int]:
    """Positions, among all tensors, of those to read; not of the image."""
    inputs = [(k, x) for k, argument in enumerate(arguments) for x in argument]
    features = [
        i
        for i, (_, x) in enumerate(inputs)
        if run.is_feature(x) and x.dim() in (3, 4) and x is not run.images
    ]
    # only those of the first argument that has some
    return [i for i in features if inputs[i][0] == inputs[features[0]][0]]


def _auto(run: TrainingPass) -> list[str]:
    model = run.model
    parts = _parts(model.backbone)
    for names in (
        find_blocks(model, run),
        _find_layers(model),
        [f'backbone.{name}' for name in parts if _layers(parts[name]) > 1],
        [f'backbone.{name}' for name in parts],
    ):
        usable = [name for name in names if run.is_usable(name)]
        if usable:
            return usable
    raise UsageError(
        "guidance.taps: 'auto' finds no block with a feature map or tokens in "
        f'{type(model.backbone).__name__}; name the modules to tap'
    )


def _stage_ends(names: Sequence[str], run: TrainingPass) -> list[str]:
    """Those after which the shape changes, and the last."""
    shapes = [
        [run.calls[name].outputs[i].shape for i in run.features(name)]
        for name in names
    ]
    ends = [shape != after for shape, after in pairwise([*shapes, None])]
    return list(compress(names, ends))


# --- candidates --------------------------------------------------------------


def find_blocks(
    model: nn.Module, run: TrainingPass | None = None
) -> list[str]:
    """Names of the repeated blocks of ``model.backbone``.

    A block is a child of a Sequential or ModuleList, has children itself and
    is not inside another block: the residual blocks of a ResNet, not its
    stages. So is one of at least three children of the backbone that are of
    one class and have several layers. A stage that is no list but holds one,
    as in a Swin Transformer, is a block only if the modules in that list are
    not chained, have a single layer, or there is no ``run`` to tell.
    """
    blocks: list[str] = []

    def visit(prefix: str, module: nn.Module) -> None:
        alike = Counter(type(child) for child in module.children())
        for name, child in module.named_children():
            path = f'{prefix}.{name}'
            # the backbone itself may be the list
            inside = isinstance(module, LISTS) or (
                module is model.backbone
                and alike[type(child)] > 2
                and _layers(child) > 1
            )
            if inside and not isinstance(child, LISTS) and _parts(child):
                blocks.extend(_inner_blocks(path, child, run) or [path])
            else:
                visit(path, child)

    visit('backbone', model.backbone)
    return blocks


def _inner_blocks(
    path: str, module: nn.Module, run: TrainingPass | None
) -> list[str]:
    found: list[str] = []
    for name, child in module.named_children():
        members = _parts(child)
        names = [f'{path}.{name}.{member}' for member in members]
        if (
            run is not None
            and isinstance(child, LISTS)
            and len(members) > 1
            and all(_parts(m) and _layers(m) > 1 for m in members.values())
            and run.are_chained(names)
        ):
            found += names
    return found


def _find_layers(model: nn.Module) -> list[str]:
    """Layers that stand in a list: some networks repeat them bare."""
    return [
        f'{path}.{name}'
        for path, module in model.backbone.named_modules(prefix='backbone')
        if isinstance(module, LISTS)
        for name, child in module.named_children()
        if is_quantizable(child)
    ]


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    return dict(module.named_children())


def _layers(module: nn.Module) -> int:
    return sum(is_quantizable(inner) for inner in module.modules())


def resolve_taps(
    model: nn.Module, taps: str | Sequence[str], place: str = 'guidance.taps'
) -> list[str]:
    """Names of the modules that shell patterns match, or a UsageError about
    the config key ``place``.

    A ``*`` does not cross a dot: ``'backbone.layer*.*'`` means the blocks of a
    ResNet, not their layers.
    """
    names = [name for name, _ in model.named_modules() if name]
    chosen: list[str] = []
    for pattern in [taps] if isinstance(taps, str) else taps:
        depth = pattern.count('.')
        level = [name for name in names if name.count('.') == depth]
        try:
            found = match(pattern, level or names, place)
        except UsageError:
            found = match(pattern, find_blocks(model) or names, place)
        chosen += [name for name in found if name not in chosen]
    return chosen
