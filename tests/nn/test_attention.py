"""MLA against the report's equations 1 to 11, its baselines MHA, GQA and MQA, and attention to a cache in parts.

tests/reference_model.py writes the equations out.
"""

import copy
import functools
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import DSA, MLA, Attention, FeedForward, ModelConfig, MoE, ops
from dsmini.functional import attention
from dsmini.nn import CompressedAttention, Context, Indexer, cached_attention
from tests import reference_model as reference
from tests.conftest import MODELS, SMALL
from tests.helpers.configs import V4, refusal
from tests.helpers.tolerances import (
    BF16_UNIT,
    FP32_MODEL,
    FP32_UNIT,
    ROPE_TABLE,
    assert_agree,
    relative_error,
    rounding,
)

SIZES, INDEX, YARN = (MODELS[name] for name in ("layer", "layer_index", "layer_yarn"))
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
    want = layer(x, Context(positions=positions[None]))
    for moved in (positions[None] + 20, torch.stack((positions, positions + 7))):
        got = layer(x, Context(positions=moved))
        assert relative_error(got, want) <= 8 * ROPE_TABLE
    assert relative_error(layer(x, Context(positions=2 * positions[None])), want) > 0.01


def reference_attention(layer: Any, x: Tensor, c: Any, hidden: Tensor) -> Tensor:
    """Return the attention of a layer that stands alone, with keys that a query may not see, in FP64."""
    return reference.attention(copy.deepcopy(layer).double(), x.double(), c, ~hidden)


@pytest.mark.parametrize("kind", [MLA, DSA, Attention])
@pytest.mark.parametrize("backend", ["reference", None])
def test_a_mask_of_a_call_takes_the_place_of_the_causal_one(randomise: Any, kind: Any, backend: str | None) -> None:
    """An encoder's, which sees all keys but padding; and rows padded on the left, which are causal."""
    extra = {"attention": "mha"} if kind is Attention else INDEX | {"index_topk": 150} if kind is DSA else {}
    sizes = {name: size for name, size in SIZES.items() if kind is not Attention or "rank" not in name}
    sizes |= {"qk_nope_head_dim": 8} if kind is Attention else {}
    c = ModelConfig(**sizes | extra | {"max_seq_len": 160})
    layer, x = randomise(kind(c)), torch.randn(2, 140, c.dim)
    padding = torch.arange(140) >= torch.tensor([[140], [91]])
    left = torch.ones(140, 140, dtype=torch.bool).triu(1) | padding.flip(1)[:, None]
    left |= torch.zeros_like(left)
    left.diagonal(dim1=1, dim2=2).fill_(False)  # padding sees itself
    for mask in (padding[:, None], left, torch.zeros(1, 1, 140, dtype=torch.bool)):
        with ops.use(backend):
            got = layer(x, mask=mask)
        want = reference_attention(layer, x, c, mask.expand(2, 140, 140))
        assert relative_error(got, want) < FP32_MODEL
    causal = torch.ones(1, 140, 140, dtype=torch.bool).triu(1)
    assert relative_error(layer(x, mask=causal), layer(x)) < FP32_MODEL


def test_an_indexer_chooses_among_the_keys_that_a_mask_leaves(randomise: Any) -> None:
    c = ModelConfig(**SIZES | INDEX | {"index_topk": 4})
    layer, x = randomise(DSA(c)), torch.randn(1, 150, 23)
    seen: list[Tensor] = []
    mask = torch.ones(1, 150, 150, dtype=torch.bool)
    mask[:, :, 135:145] = False  # ten keys, which come after the first block of queries
    layer.mask = lambda q, k: k == 140  # the layer's own hides one of them
    select = layer.select_topk
    layer.select_topk = lambda *args: (seen.append(select(*args)), seen[-1])[1]
    y = layer(x, mask=mask)
    assert ((seen[0] >= 135) & (seen[0] < 145) & (seen[0] != 140)).all() and seen[0].shape == (1, 150, 4)
    hidden = torch.ones(1, 150, 150, dtype=torch.bool).scatter(2, seen[0], False)
    assert relative_error(y, reference_attention(layer, x, c, hidden)) < FP32_MODEL


def test_wrong_input_of_a_layer_is_refused_in_a_sentence() -> None:
    layer, x = MLA(**SIZES), torch.zeros(2, 9, 23)
    unchecked: Any = functools.partial(inspect.unwrap(MLA.forward), layer)  # without the type checks of these tests
    float_mask, wrong, all_hidden = torch.zeros(2, 9, 9), torch.zeros(2, 1, 8).bool(), torch.ones(1, 1, 9).bool()
    compressed = CompressedAttention(ModelConfig(**SMALL | V4), compress_ratio=4)
    masked = Context(positions=torch.arange(9)[None], mask=float_mask.bool())
    for said, want in (
        (refusal(unchecked, x[..., :22]), "got (2, 9, 22); want [b, s, 23]"),
        (refusal(unchecked, x[0]), "got (9, 23); want [b, s, 23], sequences of hidden states; x[None] is one sequence"),
        (refusal(unchecked, x, mask=float_mask), "mask is torch.float32 [2, 9, 9]; want bool [2 or 1, 9 or 1, 9]"),
        (refusal(unchecked, x, mask=wrong), "mask is torch.bool [2, 1, 8]; want bool [2 or 1, 9 or 1, 9], True"),
        (refusal(unchecked, x, mask=all_hidden), "mask hides all keys from the query at position 0"),
        (refusal(unchecked, x, Context(positions=torch.arange(9)[None]), mask=wrong), "a context and mask="),
        (refusal(MLA, **SIZES, causal=False), "leave out causal, and hide keys in a call: layer(x, mask=...)"),
        (refusal(DSA, dim=64, n_heads=2), "needs index_n_heads, index_head_dim, index_topk; set them"),
        (refusal(Indexer, attention="mla"), "attention='mla' has no indexer; use attention='dsa'"),
        (refusal(Attention, attention="mla"), "attention='mla' is another module; use MLA"),
        (refusal(Attention, ModelConfig(**SMALL | V4)), "use CompressedAttention, or 'mha', 'gqa' or 'mqa'"),
        (refusal(compressed, torch.zeros(2, 9, 24), mask=float_mask.bool()), "leave it out, or give documents"),
        (refusal(compressed, torch.zeros(2, 9, 24), masked), "leave it out, or give documents"),
        (refusal(CompressedAttention, ModelConfig(), compress_ratio=4), "use attention='compressed'"),
        (refusal(CompressedAttention, compress_ratio=4), "attention='compressed' needs"),
    ):
        assert want in said, said


# --- the baselines, and attention to a cache in parts

BASELINE: dict[str, Any] = {"dim": 23, "n_heads": 6, "qk_nope_head_dim": 8, "v_head_dim": 5, "max_seq_len": 64}
KINDS = {"mha": (None, 6), "gqa": (2, 2), "mqa": (None, 1)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", [1, 37])
def test_baseline_equals_attention_by_hand(randomise: Any, kind: str, s: int) -> None:
    n_kv_heads, groups = KINDS[kind]
    c = ModelConfig(**BASELINE, attention=kind, n_kv_heads=n_kv_heads)
    layer = randomise(Attention(c)).double()
    assert (layer.wk.weight.shape, layer.wv.weight.shape) == ((groups * 8, 23), (groups * 5, 23))
    x = torch.randn(2, s, 23, dtype=torch.float64, requires_grad=True)
    assert_agree(layer(x), reference.attention(layer, x, c), [x, *layer.parameters()], 8 * ROPE_TABLE)
    if kind != "gqa":
        gqa = Attention(**BASELINE, attention="gqa", n_kv_heads=groups).double()
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
