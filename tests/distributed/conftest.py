"""End the processes of a file after it."""

import pytest

from tests.distributed import ranks


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path != item.path:
        ranks.end_waiting_ranks()
