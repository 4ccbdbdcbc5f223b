"""All tests of this folder need a CUDA GPU: run them with `pytest -m gpu` on a machine that has one.

DSMINI_GPU_TESTS=cpu runs on the CPU what can run there, so that a change of these tests can be tried without a GPU.
"""

import pytest

from tests.helpers.gpu import gpu_device


def pytest_runtest_setup() -> None:
    gpu_device()  # here, not in a fixture: pytest then counts all skipped tests in one line


@pytest.fixture
def device() -> str:
    return gpu_device()


@pytest.fixture(autouse=True)
def _small_process() -> None:
    """Let CUDA's libraries take memory, which other tests may not."""
