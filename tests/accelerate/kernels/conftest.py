import pytest
import torch


@pytest.fixture
def poisoned():
    """Memory that is not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
