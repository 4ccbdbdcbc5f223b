"""transformers is the oracle; its absence skips with the reason."""

import pytest

pytest.importorskip("transformers", reason="the oracle tests need transformers (pip install -e '.[test]')")
