"""MMAuxQ: train 2- to 4-bit image classifiers with an auxiliary module.

Importing the package registers the config scope ``mmauxq::`` and nothing
else; the heavy neighbours are imported when something asks for them.
"""

import os
import sys

from .version import __version__


def _end_quietly() -> None:
    """A command that Ctrl-C stops here, before it can say how, gives one line
    in place of a traceback."""
    report = sys.excepthook

    def hook(kind, error, trace) -> None:
        if not issubclass(kind, KeyboardInterrupt) or hasattr(sys, 'ps1'):
            report(kind, error, trace)
            return
        if 'RANK' not in os.environ:
            print('stopped by SIGINT', file=sys.stderr)
        raise SystemExit(130)

    sys.excepthook = hook


try:
    import mmengine  # noqa: F401
except KeyboardInterrupt:
    _end_quietly()
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
