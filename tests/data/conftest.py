"""A folder with a folder of texts in it."""

from pathlib import Path

import pytest

from tests.helpers import corpora


@pytest.fixture
def place(tmp_path: Path) -> Path:
    corpora.lay_out(tmp_path / "texts", corpora.TEXTS)
    return tmp_path
