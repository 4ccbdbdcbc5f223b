"""The backend of the tests of quantization."""

from collections.abc import Iterator

import pytest

from dsmini import ops


@pytest.fixture(scope="module")
def reference_backend() -> Iterator[None]:
    """Plain PyTorch defines the bits; fast versions are compared with it elsewhere."""
    with ops.use("reference"):
        yield
