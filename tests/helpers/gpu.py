"""The device of tests that need a GPU."""

import os

import pytest
import torch

VARIABLE = "DSMINI_GPU_TESTS"


def gpu_device() -> str:
    """Return "cuda", or skip the test without one; "cpu" where DSMINI_GPU_TESTS=cpu asks to run what can run there."""
    if os.environ.get(VARIABLE) == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here; run pytest -m gpu on a machine that has one")
    return "cuda"
