"""Skip the comparison with transformers, the oracle, where it is not installed."""

import pytest


def pytest_pycollect_makemodule() -> None:
    pytest.importorskip("transformers", reason="the oracle tests need transformers (pip install -e '.[test]')")
