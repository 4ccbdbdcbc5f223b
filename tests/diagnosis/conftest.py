"""The default corpus."""

import pytest

from dsmini.config import DataConfig
from dsmini.data.corpus import Corpus, load_corpus


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Load the default corpus."""
    return load_corpus(DataConfig(), 256, 256, tmp_path_factory.mktemp("corpus"))
