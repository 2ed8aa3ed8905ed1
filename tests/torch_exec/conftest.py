import importlib.util

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The sums of these tests are small: more threads only wait for each other."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)
