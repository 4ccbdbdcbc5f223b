"""The baselines MHA, GQA and MQA, compared with attention written out here."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import MLA, Attention, FeedForward, MoE, ops
from dsmini.functional import cached_attention as attention
from tests.conftest import SMALL
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, ROPE_TABLE, relative_error, rounding

SIZES: dict[str, Any] = {"dim": 23, "n_heads": 6, "qk_nope_head_dim": 8, "v_head_dim": 5, "max_seq_len": 64}
KINDS = {"mha": (None, 6), "gqa": (2, 2), "mqa": (None, 1)}


def by_hand(w: dict[str, Tensor], x: Tensor, n_kv_heads: int) -> Tensor:
    """Heads 0, 1, ... share the first key head, the next ones the second: group after group."""
    h, d, v_dim = SIZES["n_heads"], SIZES["qk_nope_head_dim"], SIZES["v_head_dim"]
    s = x.shape[1]
    pair = torch.arange(0, d, 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(s, dtype=torch.float64), 10000 ** (-pair / d))
    turns = torch.polar(torch.ones_like(angles), angles)

    def heads(name: str, width: int, rotated: bool) -> list[Tensor]:
        out = (x @ w[f"{name}.weight"].T).split(width, -1)
        if not rotated:
            return list(out)
        pairs = [torch.view_as_complex(head.unflatten(-1, (-1, 2)).contiguous()) for head in out]
        return [torch.view_as_real(z * turns).flatten(-2) for z in pairs]

    q, k, v = heads("wq", d, True), heads("wk", d, True), heads("wv", v_dim, False)
    assert len(q) == h and len(k) == len(v) == n_kv_heads
    visible = torch.tensor([[t <= i for t in range(s)] for i in range(s)])
    out = []
    for i in range(h):
        mine = i * n_kv_heads // h
        logits = torch.einsum("bsd,btd->bst", q[i], k[mine]) / d**0.5
        weights = torch.where(visible, logits.exp(), 0.0)
        out.append(torch.einsum("bst,btv->bsv", weights / weights.sum(-1, keepdim=True), v[mine]))
    return torch.cat(out, -1) @ w["wo.weight"].T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", [1, 37])
def test_twin_equals_attention_by_hand(randomise: Any, kind: str, s: int) -> None:
    argument, n_kv_heads = KINDS[kind]
    layer = randomise(Attention(**SIZES, attention=kind, n_kv_heads=argument)).double()
    x = torch.randn(2, s, 23, dtype=torch.float64, requires_grad=True)
    got, want = layer(x), by_hand(dict(layer.named_parameters()), x, n_kv_heads)
    assert relative_error(got, want) <= 8 * ROPE_TABLE

    direction = torch.randn_like(got)
    wrt = [x, *layer.parameters()]
    grads = [torch.autograd.grad((y * direction).sum(), wrt) for y in (got, want)]
    assert all(
        relative_error(a, b) <= 8 * ROPE_TABLE or (s == 1 and b.norm() < 1e-9) for a, b in zip(*grads, strict=True)
    )


def test_gqa_with_all_heads_equals_mha(randomise: Any) -> None:
    mha = randomise(Attention(**SIZES, attention="mha"))
    gqa = Attention(**SIZES, attention="gqa", n_kv_heads=6)
    gqa.load_state_dict(mha.state_dict())
    x = torch.randn(2, 37, 23)
    assert torch.equal(gqa(x), mha(x))


def test_mqa_equals_gqa_with_one_head(randomise: Any) -> None:
    mqa = randomise(Attention(**SIZES, attention="mqa"))
    gqa = Attention(**SIZES, attention="gqa", n_kv_heads=1)
    gqa.load_state_dict(mqa.state_dict())
    x = torch.randn(2, 37, 23)
    assert torch.equal(gqa(x), mqa(x))


def test_keys_and_values_shrink_with_the_heads_that_hold_them() -> None:
    rows = {kind: Attention(**SIZES, attention=kind, n_kv_heads=KINDS[kind][0]).wk.weight.shape[0] for kind in KINDS}
    assert rows == {"mha": 48, "gqa": 16, "mqa": 8}


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
    hidden = torch.zeros(batch, 2, t, dtype=torch.bool)
    hidden[:, 0, -1] = hidden[0, :, 70:90] = True
    got = attention.cached_attention(q, k, v, d**-0.5, hidden)

    whole_k, whole_v = (x.double().repeat_interleave(6 // groups, 1) for x in (k, v))
    logits = (torch.einsum("bhsd,bhtd->bhst", q.double(), whole_k) * d**-0.5).masked_fill(hidden[:, None], -torch.inf)
    want = torch.einsum("bhst,bhtv->bhsv", logits.softmax(-1), whole_v)
    unit = FP32_UNIT if dtype == torch.float32 else BF16_UNIT
    # sums of 8 and of 200 terms in FP32; what is rounded to dtype are logits, weights and the parts' sums
    assert relative_error(got, want) <= rounding(FP32_UNIT, terms=200, chained=2) + rounding(unit, chained=3)
    assert [part.shape[2] for part in attention.parts_of(k)] == ([t] if batch * groups == 1 else [64, 64, 64, 8])


def test_only_what_is_large_goes_in_parts_of_a_quarter() -> None:
    rows = torch.empty(1, 65536, 2, 256, dtype=torch.bfloat16, device="cpu")  # 64 MiB, no page of it is touched
    whole = rows.transpose(1, 2)
    assert [part.shape[2] for part in attention.parts_of(whole)] == [8192] * 8
    assert len(attention.parts_of(whole[:, :, :32767])) == 1
    assert len(attention.parts_of(whole[:, :, :32768])) == 4
    assert len(attention.parts_of(whole[:, :1])) == 1 and len(attention.parts_of(whole.contiguous())) == 1


def test_parts_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 parts of one: in BF16 the sum stops at 256, where one more is half a step."""
    for name in ("SPLIT_FROM", "PART"):
        monkeypatch.setattr(attention, name, 1)
    t = 64 * 512
    weights = torch.full((2, 1, t), 2.0**-6, dtype=torch.bfloat16)  # 64 of them are one
    values = torch.ones(1, t, 2, 3, dtype=torch.bfloat16).transpose(1, 2)
    assert (attention._weighted(weights, values) == 512).all()


def test_mla_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="attention='mla' is another module; use MLA"):
        Attention(attention="mla")


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("layer", [MLA, Attention, MoE, FeedForward])
def test_no_rows_give_no_rows(layer: Any, backend: str, shape: tuple[int, int]) -> None:
    x = torch.zeros(*shape, 24, requires_grad=True)
    with ops.use(backend):
        y = layer(**SMALL | ({"attention": "gqa", "n_kv_heads": 1} if layer is Attention else {}))(x)
    y = y[0] if isinstance(y, tuple) else y
    assert y.shape == x.shape
    y.sum().backward()
