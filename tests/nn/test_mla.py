"""Multi-head Latent Attention against the report's equations 1 to 11, written out here."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import MLA
from dsmini.functional.causal_attention import causal_attention_eager
from dsmini.nn import Rope, apply_rope
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, ROPE_TABLE, relative_error, rounding

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
    "beta_fast": 2.0,
    "beta_slow": 0.5,
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


def temperature(a: float, c: dict[str, Any]) -> float:
    return 0.1 * a * math.log(c["rope_factor"]) + 1 if "original_seq_len" in c else 1.0


def frequencies(c: dict[str, Any]) -> list[float]:
    """YaRN's section 3.2 with its ramp over pair numbers; without original_seq_len RoPE's theta^(-2j/d)."""
    d, theta = c["qk_rope_head_dim"], c.get("rope_theta", 10000.0)
    plain = [theta ** (-2 * j / d) for j in range(d // 2)]
    if "original_seq_len" not in c:
        return plain

    def pair_that_turns(times: float) -> float:
        return d * math.log(c["original_seq_len"] / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = math.floor(pair_that_turns(c["beta_fast"])), math.ceil(pair_that_turns(c["beta_slow"]))
    slowed = [min(max((j - first) / (last - first), 0.0), 1.0) for j in range(d // 2)]
    return [(1 - s) * f + s * f / c["rope_factor"] for f, s in zip(plain, slowed, strict=True)]


def rotate(x: Tensor, c: dict[str, Any]) -> Tensor:
    """Turn x [b, s, d] by its positions: each adjacent pair is one complex number."""
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), torch.tensor(frequencies(c)).double())
    size = 1.0
    if "original_seq_len" in c:
        size = temperature(c["mscale"], c) / temperature(c["mscale_all_dim"], c)
    turns = torch.polar(torch.full_like(angles, size), angles)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One head of one sequence, position by position: q, k [s, d], v [s, v]."""
    return torch.stack([(scale * (k[: i + 1] @ q[i])).softmax(0) @ v[: i + 1] for i in range(len(q))])


def by_the_report(w: dict[str, Tensor], x: Tensor, c: dict[str, Any]) -> Tensor:
    h, nope, rope, v_dim = c["n_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    if c["q_lora_rank"] is None:
        q = x @ w["wq.weight"].T
    else:
        q = rms_norm(x @ w["wq_a.weight"].T, w["q_norm.weight"]) @ w["wq_b.weight"].T
    compressed = x @ w["wkv_a.weight"].T
    c_kv, k_rope = compressed[..., : c["kv_lora_rank"]], compressed[..., c["kv_lora_rank"] :]
    kv = rms_norm(c_kv, w["kv_norm.weight"]) @ w["wkv_b.weight"].T
    k_rope = rotate(k_rope, c)
    scale = (nope + rope) ** -0.5 * temperature(c.get("mscale_all_dim", 1.0), c) ** 2
    heads = []
    for i in range(h):
        q_nope, q_rope = q[..., i * (nope + rope) :][..., : nope + rope].split((nope, rope), -1)
        k_nope, v = kv[..., i * (nope + v_dim) :][..., : nope + v_dim].split((nope, v_dim), -1)
        whole_q, whole_k = torch.cat((q_nope, rotate(q_rope, c)), -1), torch.cat((k_nope, k_rope), -1)
        heads.append(torch.stack([attend(*row, scale) for row in zip(whole_q, whole_k, v, strict=True)]))
    return torch.cat(heads, -1) @ w["wo.weight"].T


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("s", [1, 37])
def test_mla_follows_the_report(randomise: Any, case: str, s: int) -> None:
    c = SIZES | CASES[case]
    layer = randomise(MLA(**c)).double()
    x = torch.randn(2, s, c["dim"], dtype=torch.float64, requires_grad=True)
    got, want = layer(x), by_the_report(dict(layer.named_parameters()), x, c)
    # q and k are both off by the table's error; logits of size 4 carry it into the weights
    tolerance = 8 * ROPE_TABLE
    assert relative_error(got, want) <= tolerance

    direction = torch.randn_like(got)
    wrt = [x, *layer.parameters()]
    grads = [torch.autograd.grad((y * direction).sum(), wrt) for y in (got, want)]
    assert all(relative_error(a, b) <= tolerance or (s == 1 and b.norm() < 1e-9) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("s", [1, 63, 130])
@pytest.mark.parametrize("v_dim", [5, 12, 16])
def test_explicit_and_sdpa_attention_agree(s: int, v_dim: int) -> None:
    q, k, v = (torch.randn(2, 3, s, d, requires_grad=True) for d in (12, 12, v_dim))
    direction = torch.randn(2, 3, s, v_dim)

    def run(method: Any) -> list[Tensor]:
        y = causal_attention_eager(q, k, v, 0.4, method=method)
        return [y, *torch.autograd.grad((y * direction).sum(), [q, k, v])]

    explicit, sdpa = run("explicit"), run("sdpa")
    sizes = [t.norm().item() for t in explicit]
    for a, b, size in zip(sdpa, explicit, sizes, strict=True):
        assert (a - b).norm() <= rounding(FP32_UNIT, terms=s, chained=4) * max(size, sizes[0])


@pytest.mark.parametrize("method", ["explicit", "sdpa"])
def test_bf16_attention_is_off_by_its_roundings(method: Any) -> None:
    """Logits, weights and output are rounded to BF16; the softmax between them is not."""
    q, k, v = (torch.randn(2, 3, 63, 12).bfloat16() for _ in range(3))
    got = causal_attention_eager(q, k, v, 0.4, method=method)
    want = causal_attention_eager(q.double(), k.double(), v.double(), 0.4, method="explicit")
    assert got.dtype == torch.bfloat16
    assert relative_error(got, want) <= rounding(BF16_UNIT, chained=3)


def with_config(layer: MLA, **changes: Any) -> MLA:
    """Return the same weights under another config."""
    other = MLA(**SIZES | changes)
    other.load_state_dict(layer.state_dict())
    return other


def test_yarn_is_off_where_the_context_is_not_extended(randomise: Any) -> None:
    plain = randomise(MLA(**SIZES))
    x = torch.randn(2, 37, 23)
    changes = {"rope_factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707}
    for original_seq_len in (64, 1000, None):
        assert torch.equal(with_config(plain, original_seq_len=original_seq_len, **changes)(x), plain(x))
    extended = with_config(plain, original_seq_len=63, **changes)
    assert relative_error(extended(x), plain(x)) > 1e-3


def test_temperature_multiplies_the_whole_logit(randomise: Any) -> None:
    """A rotary key of zero leaves the nope part alone, and it too is m^2 times as sharp."""
    layer = randomise(MLA(**SIZES | {"q_lora_rank": None}))
    with torch.no_grad():
        layer.wkv_a.weight[9:] = 0
    yarn = with_config(layer, q_lora_rank=None, **YARN | {"mscale_all_dim": 0.707, "rope_factor": 40.0})
    m = 0.1 * 0.707 * math.log(40) + 1
    assert yarn.scale == pytest.approx(15**-0.5 * m**2, rel=1e-12)

    x = torch.randn(2, 37, 23)
    with torch.no_grad():
        layer.wq.weight *= m**2
    assert relative_error(yarn(x), layer(x)) <= rounding(FP32_UNIT, terms=37, chained=4)


def test_rope_turns_adjacent_pairs_and_leaves_them_there() -> None:
    rope = Rope(dim=6, theta=100.0)
    turned = apply_rope(torch.eye(6).view(1, 1, 6, 6), rope.table(torch.tensor([3])))[0, 0]
    for j in range(3):
        angle = 3 * 100 ** (-2 * j / 6)
        block = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        torch.testing.assert_close(turned[2 * j : 2 * j + 2, 2 * j : 2 * j + 2], block)
        turned[2 * j : 2 * j + 2, 2 * j : 2 * j + 2] = 0
    assert (turned == 0).all()


def logits_of(layer: MLA, x: Tensor) -> Callable[[Tensor], Tensor]:
    def at(positions: Tensor) -> Tensor:
        table = layer.rope.table(positions)
        q, (_, k_rope) = layer.queries(x, table), layer.latents(x, table)
        return torch.einsum("b s h r, b t r -> b h s t", q[..., layer.qk_nope_head_dim :], k_rope)

    return at


@pytest.mark.parametrize("rope", [{}, YARN], ids=["plain", "yarn"])
def test_logit_depends_only_on_the_difference_of_positions(randomise: Any, rope: dict[str, Any]) -> None:
    layer = randomise(MLA(**SIZES | rope)).double()
    x = torch.randn(2, 9, 23, dtype=torch.float64)
    positions = torch.tensor([0, 1, 2, 5, 6, 11, 12, 13, 20])
    at = logits_of(layer, x)
    assert relative_error(at(positions + 20), at(positions)) <= 8 * ROPE_TABLE
    assert relative_error(at(2 * positions), at(positions)) > 0.1

    moved = layer(x, layer.rope.table(positions + 20))
    assert relative_error(moved, layer(x, layer.rope.table(positions))) <= 8 * ROPE_TABLE
    rows = torch.stack((positions, positions + 7))
    assert relative_error(layer(x, layer.rope.table(rows)), layer(x, layer.rope.table(positions))) <= 8 * ROPE_TABLE
