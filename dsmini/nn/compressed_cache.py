"""The cache of compressed attention: the window's rows, the entries, and the rows of which the next entry is made.

A layer of DeepSeek-V4 stores three kinds of rows, and its indexer the last two again:

    window     the key-value row of the latest tokens               a ring: position p is in place p mod its size
    entries    one row for each whole block of m tokens             entry i is in place i
    raw        FP32 rows [C | Z] of the latest tokens               a ring, as long as an entry is made of

The two rings have SLACK places more, so that the last tokens may be taken back: their rows are written again. Nothing
is moved when an entry is complete or a token is taken back, and rows of unequal length need no care: a place follows
from a position alone, and what lies in places that do not count is hidden from every query.

Formats in FP8 and FP4: codec.py.

Source: DeepSeek-V4 report (arXiv 2606.19348), section 2.3.
"""

from typing import Any

from dsmini.config.model import SLACK
from dsmini.nn.cache import LayerCacheView, Rows


class CompressedCache:
    """The rows of a layer, of which a layer with the window alone has no entries, and an indexer no window."""

    slack: int | None = SLACK

    window: Any
    entries: Any
    raw: Any

    def __init__(self, window: Rows | None, entries: Rows | None = None, raw: Rows | None = None) -> None:
        self.window, self.entries, self.raw = window, entries, raw
        self.index: CompressedCache | None = None

    @property
    def parts(self) -> list[Rows]:
        """All rows, those of the indexer last."""
        own = [rows for rows in (self.window, self.entries, self.raw) if rows is not None]
        return own if self.index is None else [*own, *self.index.parts]


def stored(cache: LayerCacheView) -> CompressedCache:
    """Return what a layer or its indexer stores."""
    assert isinstance(cache.store, CompressedCache), "a cache is made by the new_cache of its model"
    return cache.store
