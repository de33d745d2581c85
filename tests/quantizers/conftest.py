"""Shared by the tests of the quantizers."""

import logging

import pytest
from mmengine.logging import MMLogger


@pytest.fixture
def warnings_logged():
    """Texts of the warnings that reached MMEngine's logger."""

    class Collect(logging.Handler):
        def emit(self, record):
            texts.append(record.getMessage())

    texts = []
    handler = Collect(logging.WARNING)
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)
