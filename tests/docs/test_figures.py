"""The figures are those that docs/figures.py draws, and their shapes are those of a small model's tensors."""

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from docs.figures import FIGURES, FOLDER, boxes_of, draw, length
from dsmini import Transformer, ops
from tests.conftest import SMALL
from tests.helpers.commands import ROOT

Shapes = dict[str, set[tuple[int, ...]]]
BATCH, NEW, CACHED = 2, 3, 19
"""Number of sequences, of their new tokens, and of all tokens in the cache after these."""
# no two axes have the same length, nor do their sums
SIZES = SMALL | {"n_layers": 1, "n_dense_layers": 0, "n_mtp_layers": 0, "max_seq_len": CACHED}
SIZES |= {"n_heads": 5, "kv_lora_rank": 13, "v_head_dim": 9}
V4 = {"attention": "compressed", "n_heads": 10, "head_dim": 34, "window_size": 8, "o_groups": 5, "o_lora_rank": 21}
V4 |= {"index_n_heads": 11, "index_head_dim": 16, "index_topk": 3}
INDEXER = {"attention": "dsa", "index_n_heads": 11, "index_head_dim": 16, "index_topk": 7}


@contextmanager
def shapes_by_name() -> Iterator[Shapes]:
    """Yield the shapes of local variables and of results of dsmini's functions that return inside the block."""
    shapes: Shapes = defaultdict(set)

    def note(frame: FrameType, event: str, result: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "return" and ROOT / "dsmini" in file.parents:
            function = f"{file.stem}.{frame.f_code.co_qualname}"
            for name, value in [("", result), *frame.f_locals.items()]:
                if isinstance(value, torch.Tensor):
                    shapes[f"{function} {name}".strip()].add(tuple(value.shape))

    sys.setprofile(note)
    try:
        yield shapes
    finally:
        sys.setprofile(None)


@torch.no_grad()
def shapes_in_decoding(backend: str, forms: tuple[Any, ...], **changes: Any) -> Shapes:
    """Return the shapes by name while a small model reads NEW tokens after others, in each form of attention.

    Without a form it reads all tokens at once, without a cache.
    """
    model, tokens = Transformer(**SIZES | changes), torch.zeros(BATCH, CACHED, dtype=torch.int64)
    if not forms:
        with ops.use(backend), shapes_by_name() as shapes:
            model(tokens)
        return shapes
    caches = [model.new_cache(BATCH, form=form) for form in forms]
    with ops.use(backend):
        for cache in caches:
            model(tokens[:, :-NEW], cache)
        with shapes_by_name() as shapes:
            for cache in caches:
                model(tokens[:, -NEW:], cache)
    return shapes


@pytest.mark.parametrize(
    ("name", "backend", "forms", "changes"),
    [
        ("mla", "reference", ("expanded", "absorbed"), {}),
        ("moe", "eager", ("auto",), {}),
        ("dsa", "eager", ("absorbed",), INDEXER),
        ("csa", "reference", (), V4 | {"compress_ratios": (4,)}),
        ("hca", "reference", (), V4 | {"compress_ratios": (6,)}),
    ],
)
def test_shapes_in_a_figure_are_those_of_a_model(
    name: str, backend: str, forms: tuple[str, ...], changes: dict[str, Any]
) -> None:
    figure, config = FIGURES[name], Transformer(**SIZES | changes).config
    sizes = {axis: getattr(config, field) for axis, field in figure["axes"].items()}
    (block,) = config.compress_ratios or (1,)
    entries = CACHED // block if config.compress_ratios else BATCH * NEW
    sizes = {"b": BATCH, "s": NEW if forms else CACHED, "t": CACHED, "n": entries, "p": block} | sizes
    shapes = shapes_in_decoding(backend, forms, **changes)
    drawn = {box.where: {tuple(int(length(axis, sizes)) for axis in box.axes.split())} for box in boxes_of(figure)}
    assert {where: shapes.get(where) for where in drawn} == drawn


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_the_one_that_the_script_draws(name: str) -> None:
    assert (FOLDER / f"{name}.svg").read_text() == draw(FIGURES[name]), "run: python docs/figures.py"
