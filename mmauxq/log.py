"""Lines of MMEngine's log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.logging import MMLogger, print_log


def log(text: str, level: int = logging.INFO) -> None:
    """Write a line."""
    print_log(text, logger='current', level=level)


def warn(text: str) -> None:
    """Write a line that is a warning."""
    log(text, logging.WARNING)


@contextmanager
def quiet_log() -> Iterator[None]:
    """While active, show warnings alone."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
