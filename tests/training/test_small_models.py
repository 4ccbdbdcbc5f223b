"""The options that DeepSeek does not have and small models gain from: zero_init, embed_norm, qk_norm."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsmini import MLA, Attention, Transformer
from dsmini.nn.layers import rms_norm
from dsmini.nn.rope import apply_rope
from tests.helpers.tolerances import FP32_UNIT, relative_error, rounding

Config = Callable[..., Any]


def test_with_zero_init_a_model_starts_undecided_and_can_learn(small_config: Config) -> None:
    model = Transformer(small_config(zero_init=True))
    tokens = torch.randint(0, 61, (2, 21))
    x = model.embed(tokens)
    for block in model.layers:
        y, _ = block(x)
        assert torch.equal(y, x)
    assert model(tokens).abs().max() == 0
    losses = model.losses(tokens[:, :-1], tokens[:, 1:])
    assert losses.main.item() == pytest.approx(torch.tensor(61.0).log().item(), rel=1e-6)
    losses.total.backward()
    assert model.head.weight.grad is not None and model.head.weight.grad.abs().max() > 0


def test_zero_init_zeroes_only_writers_to_the_residual_stream(small_config: Config) -> None:
    zero = {n for n, p in Transformer(small_config(zero_init=True)).named_parameters() if p.abs().max() == 0}
    ends = ("head.weight", "wo.weight", "w2.weight", "experts.w2")
    assert zero == {n for n, _ in Transformer(small_config()).named_parameters() if n.endswith(ends)}
    assert not {n for n, p in Transformer(small_config()).named_parameters() if p.abs().max() == 0}


def test_embed_norm_norms_the_embedding_of_the_trunk_and_of_mtp(small_model: Callable[..., Transformer]) -> None:
    model = small_model(embed_norm=True)
    tokens = torch.randint(0, 61, (2, 21))
    assert model.embed_norm is not None
    want = model.run(tokens, mtp=True)
    rows = rms_norm(model.embed.weight, model.embed_norm.weight, model.embed_norm.eps)
    with torch.no_grad():
        model.embed.weight.copy_(rows)
    model.embed_norm = None
    got = model.run(tokens, mtp=True)
    tolerance = rounding(FP32_UNIT, terms=64, chained=30)
    for a, b in zip([got.logits, *got.mtp_logits], [want.logits, *want.mtp_logits], strict=True):
        assert relative_error(a, b) < tolerance


@pytest.mark.parametrize("kind", ["mla", "mha"])
def test_qk_norm_norms_each_head_whole(randomise: Any, kind: str) -> None:
    """Logits do not change when a head's queries grow, and the norm of a query is that of its norm's weights."""
    sizes: dict[str, Any] = {"dim": 24, "n_heads": 3, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
    layer = randomise(
        MLA(**sizes, q_lora_rank=None, qk_norm=True) if kind == "mla" else Attention(**sizes, qk_norm=True)
    )
    x = torch.randn(2, 9, 24)
    before = layer(x)
    width = 10 if kind == "mla" else 6
    with torch.no_grad():
        layer.wq.weight[width : 2 * width] *= 1000  # the second head
    assert relative_error(layer(x), before) < 1e-5
    plain = MLA(**sizes, q_lora_rank=None) if kind == "mla" else Attention(**sizes)
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if "head_norm" not in n})
    assert relative_error(plain(x), before) > 1e-2
    if kind == "mha":  # by hand
        table = layer.rope.cos_sin(torch.arange(9))
        q, k = (apply_rope((x @ w.T).unflatten(-1, (3, 6)), table) for w in (layer.wq.weight, layer.wk.weight))
        q, k = (h / h.square().mean(-1, keepdim=True).add(1e-6).sqrt() for h in (q, k))
        logits = torch.einsum("bshd,bthd->bhst", q * layer.q_head_norm.weight, k * layer.k_head_norm.weight) / 6**0.5
        p = logits.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
        v = (x @ layer.wv.weight.T).unflatten(-1, (3, 5))
        y = torch.einsum("bhst,bthd->bshd", p, v).flatten(2) @ layer.wo.weight.T
        assert relative_error(before, y) < 1e-5
