"""A folder with a folder of texts in it."""

from pathlib import Path

import pytest

from tests.helpers import corpora


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Make a folder with a folder of texts in it."""
    (tmp_path / "texts").mkdir()
    for name, text in corpora.TEXTS.items():
        (tmp_path / "texts" / name).write_bytes(text)
    return tmp_path
