"""Chunks longer than the blocks in which attention runs, after tokens that are cached already."""

from typing import Any

import pytest
import torch

from dsmini import Transformer, ops
from tests.conftest import SMALL, randomise
from tests.helpers.tolerances import FP32_UNIT, relative_error, rounding

CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "expanded": ({}, "expanded"),
    "absorbed": ({}, "absorbed"),
    "gqa": ({"attention": "gqa", "n_kv_heads": 1}, "auto"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_chunk_of_290_after_cached_tokens_answers_as_without_a_cache(case: str, backend: str) -> None:
    changes, form = CASES[case]
    model = randomise(Transformer(**SMALL | changes | {"n_mtp_layers": 0, "max_seq_len": 320}))
    tokens = torch.randint(0, SMALL["vocab_size"], (2, 297))
    with ops.use(backend), torch.no_grad():
        want, cache = model(tokens), model.new_cache(2, form=form)
        got = torch.cat([model(part, cache) for part in tokens.split((7, 290), 1)], 1)
    tolerance = rounding(FP32_UNIT, terms=297, chained=80)
    for start in range(0, 297, 64):
        assert relative_error(got[:, start : start + 64], want[:, start : start + 64]) < tolerance, start
