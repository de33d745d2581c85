"""The names of the measurements.

========================================  =====================================
``ops/activations``                       activation quantizers
``ops/weights/NETWORK``                   all weights of a network
``step/NETWORK/WHAT/FORM/BATCH``          a training step
``runner/NETWORK/WHAT/FORM/BATCH``        an iteration of ``tools/train.py``
``scaling/NETWORK/WHAT/FORM/BATCH/GPUS``  the same of ``tools/dist_train.sh``
``loader/NETWORK/WORKERS[/DECODER]``      the data loader alone
``epoch/NETWORK``                         an epoch on digits, on the CPU
========================================  =====================================
"""

import fnmatch
from collections.abc import Iterator, Sequence

from mmauxq.errors import UsageError, unknown_name

from .recipes import (
    DECODERS,
    DIGITS,
    FORMS,
    GUIDANCE,
    OPTIONS,
    PEER,
    RECIPES,
)

BATCH, SMALL_BATCH = 256, 32
STEPS = {
    'step': (RECIPES, FORMS),
    'runner': ([*RECIPES, PEER], OPTIONS),
    'scaling': (GUIDANCE, OPTIONS),
}
"""Kind of a name -> what WHAT and FORM may be."""


def _arms() -> Iterator[str]:
    """All names, the most important first: a budget may end early."""
    yield 'ops/activations'
    yield 'ops/weights/r50'
    for arm in (
        'float/compiled', 'float/eager', 'w4a4/compiled', 'w4a4/eager',
        'w4a4/codes', 'w4a4/recompute', 'w4a4/graphed', 'w4a4/graphed-codes',
        'w4a4/graphed-recompute', 'aux/graphed', 'aux-quarter/graphed',
        'kd/graphed', 'aux/graphed-codes', 'aux/graphed-recompute',
        'float/graphed', 'float/graph', 'aux/compiled',
        'aux-quarter/compiled', 'kd/compiled', 'w4a4/compiled-reference',
        'w4a4/compiled-kernel', 'w4a4/compiled-codes',
        'w4a4/compiled-recompute', 'aux/compiled-codes', 'aux/codes',
        'aux/recompute', 'aux-float32/graphed',
        'aux/eager', 'kd/eager', 'w4a4/reference', 'w4a4/graph',
        'w4a4/chained', 'dsn/compiled',
    ):  # fmt: skip
        yield f'step/r50/{arm}/{BATCH}'
    for arm in (
        'float/graph', 'w4a4/graphed', 'float/eager', 'w4a4/eager',
        'float/compiled-graph', 'w4a4/compiled-graph',
    ):  # fmt: skip
        yield f'step/r50/{arm}/{SMALL_BATCH}'
    for form in ('plain', 'compiled', 'graphed', 'graphed-codes', 'codes'):
        yield f'runner/r50/w4a4/{form}/{BATCH}'
    yield f'runner/r50/float/compiled-fused/{BATCH}'
    for arm in (f'{PEER}/plain', 'w4a4/plain', 'aux/plain', 'aux/eager'):
        yield f'runner/r18/{arm}/{SMALL_BATCH}'
    for arm in ('float', 'w4a4', 'aux'):
        yield f'runner/r20/{arm}/plain/128'
    for network in ('deits', 'mbv2', 'r18'):
        for arm in (
            'float/compiled', 'float/eager', 'w4a4/compiled', 'w4a4/eager',
            'w4a4/graphed', 'w4a4/graphed-codes', 'aux-quarter/compiled',
            'aux/compiled',
        ):  # fmt: skip
            yield f'step/{network}/{arm}/{BATCH}'
    for arm in ('r50/aux', 'mbv2/w4a4', 'deits/w4a4'):
        yield f'runner/{arm}/graphed/{BATCH}'
    for arm in (
        'r50/w4a4/plain', 'r50/aux/plain', 'r50/kd/plain', 'r18/aux/plain',
        'r50/w4a4/graphed', 'r50/w4a4/compiled', 'r50/w4a4/syncbn',
    ):  # fmt: skip
        yield f'scaling/{arm}/{BATCH}'
    yield from (f'loader/r18/{workers}' for workers in (1, 2, 'all'))
    yield 'epoch/r20'
    for decoder in DECODERS[1:6]:  # the others need more than is required
        yield f'loader/r18/1/{decoder}'


ARMS = list(_arms())


def chosen(patterns: Sequence[str]) -> list[str]:
    """Names of measurements, those of ``scaling`` without the GPUS.

    Args:
        patterns: Shell patterns of the standard names (all of them if empty),
            or other names, such as those with another batch size.

    Raises:
        UsageError: If one is neither.
    """
    names: list[str] = []
    for pattern in patterns or ['*']:
        matches = fnmatch.filter(ARMS, pattern)
        if not matches:
            _check(pattern)
            matches = [pattern]
        names += [name for name in matches if name not in names]
    return names


def check_decoders(names: Sequence[str]) -> None:
    """Raise UsageError if a decoder of ``loader/*`` cannot run here."""
    for name in names:
        kind, *decoder = name.split('/')[::3]
        if kind == 'loader' and decoder:
            from .decoders import check  # imports what only loaders need

            check(decoder[0])


def _check(name: str) -> None:
    kind, *parts = name.split('/')
    match parts:
        case ['weights', _] if kind == 'ops':
            return
        case [network] if kind == 'epoch' and network in DIGITS:
            return
        case [_, workers, *decoder] if kind == 'loader' and (
            len(decoder) < 2 and (workers == 'all' or _is_count(workers))
        ):
            if decoder and decoder[0] not in DECODERS:
                raise unknown_name(f'--only {name}', decoder[0], DECODERS)
            return
        case [_, what, form, batch] if kind in STEPS and _is_count(batch):
            for word, known in zip((what, form), STEPS[kind], strict=True):
                if word not in known:
                    raise unknown_name(f'--only {name}', word, known)
            return
    raise UsageError(
        '--only: expected names of measurements, or patterns of them, such '
        f"as 'step/r50/*' or {ARMS[2]} (--list shows all), got {name!r}"
    )


def _is_count(text: str) -> bool:
    return text.isdecimal() and int(text) > 0
