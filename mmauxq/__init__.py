"""MMAuxQ: train 2- to 4-bit image classifiers with an auxiliary module.

Importing the package registers the config scope ``mmauxq::`` and nothing
else; the heavy neighbours are imported when something asks for them.
"""

from typing import Any

from .version import __version__

try:
    import mmengine  # noqa: F401
except KeyboardInterrupt:
    from .stopping import end_quietly

    end_quietly()
    raise
except ModuleNotFoundError as error:
    if error.name != 'mmengine':
        raise
    raise ImportError(
        'mmauxq needs MMEngine: pip install "mmauxq[openmmlab]", or see the '
        'README for the onedl-* packages'
    ) from None

from .compat import register_config_scope

register_config_scope()

API = (
    'audit', 'export_onnx', 'load_packed', 'load_slim', 'parameter_groups',
    'prepare', 'save_packed', 'save_slim',
)  # fmt: skip
"""What :mod:`mmauxq.api` has, imported when it is asked for."""
__all__ = ['__version__', *API]


def __getattr__(name: str) -> Any:
    if name not in API:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from . import api

    return getattr(api, name)
