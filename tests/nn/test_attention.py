"""The baselines MHA, GQA and MQA against tests/reference_model.py, and attention to a cache in parts."""

from typing import Any

import pytest
import torch

from dsmini import MLA, Attention, FeedForward, ModelConfig, MoE, ops
from dsmini.functional import attention
from dsmini.nn import CompressedAttention, cached_attention
from tests import reference_model as reference
from tests.conftest import SMALL
from tests.helpers.configs import V4
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, ROPE_TABLE, assert_agree, relative_error, rounding

SIZES: dict[str, Any] = {"dim": 23, "n_heads": 6, "qk_nope_head_dim": 8, "v_head_dim": 5, "max_seq_len": 64}
KINDS = {"mha": (None, 6), "gqa": (2, 2), "mqa": (None, 1)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", [1, 37])
def test_baseline_equals_attention_by_hand(randomise: Any, kind: str, s: int) -> None:
    n_kv_heads, groups = KINDS[kind]
    c = ModelConfig(**SIZES, attention=kind, n_kv_heads=n_kv_heads)
    layer = randomise(Attention(c)).double()
    assert (layer.wk.weight.shape, layer.wv.weight.shape) == ((groups * 8, 23), (groups * 5, 23))
    x = torch.randn(2, s, 23, dtype=torch.float64, requires_grad=True)
    assert_agree(layer(x), reference.attention(layer, x, c), [x, *layer.parameters()], 8 * ROPE_TABLE)
    if kind != "gqa":
        gqa = Attention(**SIZES, attention="gqa", n_kv_heads=groups).double()
        gqa.load_state_dict(layer.state_dict())
        assert torch.equal(gqa(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (3, 1), (1, 6), (2, 3)])
def test_decoding_in_parts_equals_attention_by_hand(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, batch: int, groups: int
) -> None:
    """Read a cache whose rows hold keys and values of all heads side by side, in parts the last of which is ragged."""
    for name in ("SPLIT_FROM", "PART"):
        monkeypatch.setattr(attention, name, 1)  # so 64 keys at a time
    t, d, width = 200, 8, 5
    q = torch.randn(batch, 6, 2, d).to(dtype)
    rows = torch.randn(batch, t + 7, groups * (d + width)).to(dtype)[:, :t]
    k, v = (part.unflatten(-1, (groups, -1)).transpose(1, 2) for part in rows.tensor_split((groups * d,), -1))
    mask = torch.zeros(batch, 2, t, dtype=torch.bool)
    mask[:, 0, -1] = mask[0, :, 70:90] = True
    got = attention.cached_attention_eager(q, k, v, d**-0.5, mask)
    want = cached_attention.reference(q.double(), k.double(), v.double(), d**-0.5, mask)
    unit = FP32_UNIT if dtype == torch.float32 else BF16_UNIT
    # sums of 8 and of 200 terms in FP32; what is rounded to dtype are logits, weights and the parts' sums
    assert relative_error(got, want) <= rounding(FP32_UNIT, terms=200, chained=2) + rounding(unit, chained=3)
    assert [part.shape[2] for part in attention.split_keys(k)] == ([t] if batch * groups == 1 else [64, 64, 64, 8])


def test_parts_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 parts of one: in BF16 the sum stops at 256, where one more is half a step."""
    for name in ("SPLIT_FROM", "PART"):
        monkeypatch.setattr(attention, name, 1)
    t = 64 * 512
    weights = torch.full((2, 1, t), 2.0**-6, dtype=torch.bfloat16)  # 64 of them are one
    values = torch.ones(1, t, 2, 3, dtype=torch.bfloat16).transpose(1, 2)
    assert (attention._weighted(weights, values) == 512).all()


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("layer", [MLA, Attention, CompressedAttention, MoE, FeedForward])
def test_no_rows_give_no_rows(layer: Any, backend: str) -> None:
    of_kind: dict[Any, dict[str, Any]] = {
        Attention: {"attention": "gqa", "n_kv_heads": 1},
        CompressedAttention: V4 | {"n_layers": 1, "compress_ratios": (4,), "compress_ratio": 4},
    }
    module = layer(**SMALL | of_kind.get(layer, {}))
    for shape in ((0, 5), (2, 0), (0, 0)):
        x = torch.zeros(*shape, 24, requires_grad=True)
        with ops.use(backend):
            y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        assert y.shape == x.shape
        y.sum().backward()
