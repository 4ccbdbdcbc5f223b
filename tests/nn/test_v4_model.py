"""DeepSeek-V4's streams in whole models: in MTP, as they start, and in short formats; and the limit of SwiGLU."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsmini import FeedForward, ModelConfig, Transformer, load_pretrained, save_pretrained
from dsmini.nn import Context, Experts
from dsmini.nn.fp8 import hold_all_fp8
from dsmini.nn.layers import in_precision
from dsmini.nn.residual import CONNECTIONS
from tests.conftest import SMALL, randomise
from tests.helpers.configs import V4_MODEL
from tests.helpers.tolerances import E4M3_UNIT, relative_error

SIZES: dict[str, Any] = SMALL | V4_MODEL | {"hc_eps": 1e-12, "hc_sinkhorn_iters": 2, "hc_mult": 3, "n_mtp_layers": 2}
TOKENS = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mtp_input", ["post_norm", "pre_norm"])
def test_mtp_joins_the_next_embedding_with_every_stream(mtp_input: str) -> None:
    """It reads all streams as the last block left them, whatever mtp_input says, and has a head of its own."""
    model: Any = randomise(Transformer(**SIZES, mtp_input=mtp_input)).double().eval()
    x, embedding = model.states(TOKENS).given, model.embed.weight[TOKENS]
    for k, (depth, got) in enumerate(zip(model.mtp, model.run(TOKENS, mtp=True).mtp_logits, strict=True), 1):
        n = TOKENS.shape[1] - k
        joined = depth.e_proj(depth.enorm(embedding[:, k:]))[:, :, None] + depth.h_proj(depth.hnorm(x[:, :n]))
        x, _ = depth.block(joined, Context(positions=torch.arange(n)[None], tokens=TOKENS[:, k:]))
        assert relative_error(got, model.head(depth.norm(depth.hc_head.collapse(x)))) < 1e-8


@pytest.mark.parametrize("kind", CONNECTIONS)
def test_starts_as_the_model_without_streams(kind: Any) -> None:
    """With the same other weights the losses agree, MTP's too: its block then reads states before the norm."""
    plain = ModelConfig(**SMALL | V4_MODEL | {"hc_mult": 1, "mtp_input": "pre_norm"})
    one, four = Transformer(plain), Transformer(dataclasses.replace(plain, hc_mult=4, hc_kind=kind))
    state = one.state_dict()
    for name in [name for name in state if name.endswith("eh_proj.weight")]:
        e, h = state.pop(name).chunk(2, 1)
        state |= {name.replace("eh_proj", "e_proj"): e, name.replace("eh_proj", "h_proj"): h}
    missing, unknown = four.load_state_dict(state, strict=False)
    assert not unknown and all("hc_" in name for name in missing)
    for got, want in zip(four.losses(TOKENS, TOKENS)[:3], one.losses(TOKENS, TOKENS)[:3], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_without_a_layer_that_chooses_no_size_of_an_indexer_is_needed(tmp_path: Path) -> None:
    ratios = tuple(8 if ratio == 4 else ratio for ratio in SIZES["compress_ratios"])
    sizes = {name: value for name, value in SIZES.items() if not name.startswith("index_")}
    model = randomise(Transformer(**sizes | {"compress_ratios": ratios})).eval()
    assert model.config.index_topk is None
    whole, cache = model(TOKENS), model.new_cache(2)
    model(TOKENS[:, :9], cache)
    assert relative_error(model(TOKENS[:, 9:], cache), whole[:, 9:]) < 1e-5
    save_pretrained(model, tmp_path / "folder")
    assert torch.equal(load_pretrained(tmp_path / "folder").eval()(TOKENS), whole)
    with pytest.raises(ValueError, match="needs index_n_heads, index_head_dim, index_topk"):
        ModelConfig(**sizes)


def test_bf16_leaves_what_weighs_in_fp32_and_trains() -> None:
    model = Transformer(ModelConfig(**SMALL | V4_MODEL)).bfloat16()
    exact = ("hc_", "gate.", "norm", "attn_sink", "compressor.", "weights_proj")
    for name, p in model.named_parameters():
        assert (p.dtype == torch.float32) == any(part in name for part in exact), name
    assert model(TOKENS).dtype == torch.float32, "the head multiplies in FP32, as in DeepSeek's code"
    losses = model.losses(TOKENS, TOKENS)
    losses.total.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("held", [False, True], ids=["numbers", "codes"])
@pytest.mark.parametrize("precision", ["native", "fp8"])
def test_limit_clamps_shared_and_routed_before_silu(precision: Any, held: bool) -> None:
    """gate is at most 1 and up within 1, so that the hidden vector is within silu(1), 0.73; without a limit beyond."""
    x, experts = 4 * torch.randn(50, 8), (torch.arange(50)[:, None] % 8, torch.ones(50, 1))
    for limit in (None, 1.0):
        sizes: dict[str, Any] = {"dim": 8, "inter_dim": 8, "moe_inter_dim": 8, "n_routed_experts": 8}
        c = ModelConfig(**sizes, precision=precision, swiglu_limit=limit)
        layers = nn.ModuleList(in_precision(c, kind)(c) for kind in (FeedForward, Experts))
        with torch.no_grad():
            for name, p in layers.named_parameters():
                p.copy_(torch.eye(8) if "w2" in name else 2 * torch.randn_like(p))
        shared, routed = hold_all_fp8(layers.eval()) if held else layers
        for y in (shared(x), routed(x, *experts)):
            assert y.max() > 0.6 and y.min() < -0.6
            assert (y.abs().max() < 0.7311 * (1 + 3 * E4M3_UNIT)) == (limit is not None)
