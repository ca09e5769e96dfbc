"""Fixtures that several test files use."""

import pytest

from main import set_library_defaults

set_library_defaults()  # before any test file imports torch


@pytest.fixture(scope="module")
def one_thread():
    """Torch on one thread for the length of a test file."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
