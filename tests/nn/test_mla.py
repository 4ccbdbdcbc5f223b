"""Multi-head Latent Attention against the report's equations 1 to 11, which tests/reference_model.py writes out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import MLA, ModelConfig
from dsmini.nn import AttentionContext
from tests import reference_model as reference
from tests.helpers.tolerances import ROPE_TABLE, assert_agree, relative_error

SIZES: dict[str, Any] = {
    "dim": 23,
    "n_heads": 3,
    "q_lora_rank": 13,
    "kv_lora_rank": 9,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "norm_eps": 0.5,
    "max_seq_len": 64,
}
YARN: dict[str, Any] = {
    "original_seq_len": 16,
    "rope_theta": 100.0,
    "rope_factor": 8.0,
    "beta_fast": 0.5,
    "beta_slow": 0.1,
    "mscale": 0.707,
    "mscale_all_dim": 1.3,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no query compression": {"q_lora_rank": None},
    "yarn": YARN,
    "yarn without query compression": YARN | {"q_lora_rank": None},
    "yarn, one temperature": YARN | {"mscale_all_dim": 0.707},
    "yarn, no temperature": YARN | {"mscale_all_dim": 0.0, "mscale": 0.0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("s", [1, 37])
def test_mla_follows_the_report(randomise: Any, case: str, s: int) -> None:
    c = ModelConfig(**SIZES | CASES[case])
    layer = randomise(MLA(c)).double()
    x = torch.randn(2, s, c.dim, dtype=torch.float64, requires_grad=True)
    # q and k are both off by the table's error; logits of size 4 carry it into the weights
    assert_agree(layer(x), reference.attention(layer, x, c), [x, *layer.parameters()], 8 * ROPE_TABLE)


@pytest.mark.parametrize("rope", [{}, YARN], ids=["plain", "yarn"])
def test_logit_depends_only_on_the_difference_of_positions(randomise: Any, rope: dict[str, Any]) -> None:
    layer = randomise(MLA(**SIZES | rope)).double()
    x = torch.randn(2, 9, 23, dtype=torch.float64)
    positions = torch.tensor([0, 1, 2, 5, 6, 11, 12, 13, 20])

    def logits(at: Tensor) -> Tensor:
        cos_sin = layer.rope.cos_sin(at)
        q_rope = layer.queries(layer.query_latent(x), cos_sin)[..., layer.qk_nope_head_dim :]
        return torch.einsum("b s h r, b t r -> b h s t", q_rope, layer.latents(x, cos_sin)[1])

    assert relative_error(logits(positions + 20), logits(positions)) <= 8 * ROPE_TABLE
    assert relative_error(logits(2 * positions), logits(positions)) > 0.1
    want = layer(x, AttentionContext(cos_sin=layer.rope.cos_sin(positions)))
    for moved in (positions + 20, torch.stack((positions, positions + 7))):
        got = layer(x, AttentionContext(cos_sin=layer.rope.cos_sin(moved)))
        assert relative_error(got, want) <= 8 * ROPE_TABLE
