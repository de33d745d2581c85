"""``KEY=VALUE`` of a command line, laid over a config."""

import functools
import inspect
import re
from typing import Any

from mmengine.config import Config

from mmauxq.errors import UsageError


def merge_options(cfg: Config, options: dict[str, Any], source: str) -> None:
    """MMEngine's merge, with errors that name the key.

    Args:
        cfg: Changed.
        options: Values by their dotted keys; elements of lists have numbers.
        source: Where they come from, for the messages.

    Raises:
        UsageError: If a key leads into something that has no parts, out of
            a list, or to a top-level name that neither the config nor
            MMEngine's runner knows.
    """
    for key, value in options.items():
        try:
            *_, (inner, last) = _way(cfg, key)
            if isinstance(inner, list):
                inner[int(last)] = value
            else:
                cfg.merge_from_dict({key: value})
        except (TypeError, AttributeError, UsageError) as error:
            raise UsageError(f'{source} {key}: {error}') from error


def _way(cfg: Config, key: str) -> list[tuple[Any, str]]:
    """What the parts of a key are looked up in, one after the other."""
    parts = key.split('.')
    if parts[0] not in cfg and parts[0] not in settings_of_a_run():
        raise UsageError(
            f'neither the config nor a run has {parts[0]!r}; the config has '
            f'{sorted(cfg)}'
        )
    value: Any = cfg._cfg_dict
    way = []
    for i, part in enumerate(parts):
        so_far = '.'.join(parts[:i])
        way.append((value, part))
        if isinstance(value, list):
            if not part.isdigit() or int(part) >= len(value):
                raise UsageError(
                    f'{so_far} is a list of {len(value)}; allowed are '
                    f'{[f"{so_far}.{j}" for j in range(len(value))]}'
                )
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value.get(part, {})
        else:
            raise UsageError(f'{so_far} is {value!r}, which has no {part!r}')
    return way


@functools.cache
def settings_of_a_run() -> set[str]:
    """Arguments of MMEngine's runner, and what it asks its config for."""
    from mmengine.runner import Runner  # takes a second

    asked = re.findall(r"cfg\.get\(\s*'(\w+)'", inspect.getsource(Runner))
    return {*inspect.signature(Runner.__init__).parameters, *asked} - {'self'}
