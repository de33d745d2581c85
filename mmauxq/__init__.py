"""MMAuxQ: train 2- to 4-bit image classifiers with an auxiliary module.

Importing the package registers the config scope ``mmauxq::`` and nothing
else; the heavy neighbours are imported when something asks for them.
"""

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

__all__ = ['__version__']
