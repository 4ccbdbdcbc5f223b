"""Streams: the start as a pre-norm residual, doubly stochastic mixing, dtypes; whole models of V4; SwiGLU's limit."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsmini import FeedForward, ModelConfig, Transformer, load_pretrained, save_pretrained
from dsmini.nn import Context, Experts
from dsmini.nn.fp8 import hold_all_fp8
from dsmini.nn.hyper_connections import HyperConnection, StreamHead, expand, sinkhorn
from dsmini.nn.layers import in_precision
from dsmini.nn.residual import CONNECTIONS
from tests.conftest import SMALL, randomise
from tests.helpers.configs import ENGRAM, V4_MODEL
from tests.helpers.tolerances import E4M3_UNIT, relative_error

B, S, N, M = 2, 5, 4, 16


@pytest.mark.parametrize("kind", CONNECTIONS)
@pytest.mark.parametrize("n", [2, N, 64])
def test_starts_as_a_pre_norm_residual(n: int, kind: str) -> None:
    """Three sublayers with other homes: their streams stay equal to the plain residual."""
    x, layers = torch.randn(B, S, M), [nn.Linear(M, M) for _ in range(3)]
    streams, head = expand(x, n), StreamHead(M, n)
    for i, layer in enumerate(layers):
        connection = CONNECTIONS[kind](M, n, home=i)
        read, mix = connection.read(streams)
        torch.testing.assert_close(read, x, rtol=1e-5, atol=1e-5)
        streams, x = connection.write(streams, layer(read), mix), x + layer(x)
    torch.testing.assert_close(streams, expand(x, n), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.collapse(streams), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "scales"), [("sinkhorn", 3), ("identity", 2)])
def test_streams_part_as_they_learn(kind: str, scales: int) -> None:
    """The gradients of pre differ between a home and the others, those of fn are not zero, and comb mixes a little."""
    connection = CONNECTIONS[kind](M, N, home=2)
    assert connection.base[:N].argmax() == 2
    assert connection.scale.tolist() == pytest.approx([0.01] * scales), "mHC, table 5"
    streams = torch.randn(B, S, N, M)
    read, mix = connection.read(streams)
    if mix.comb is not None:
        kept = mix.comb.diagonal(dim1=-2, dim2=-1)
        assert kept.min() > 0.9 and kept.max() < 0.998, "a softmax nearer to 1 hardly has a gradient"
    connection.write(streams, read.tanh(), mix).square().sum().backward()
    grads = connection.base.grad
    assert grads is not None and connection.fn.grad is not None and connection.fn.grad.abs().max() > 0
    assert len({round(float(g), 6) for g in grads[:N]}) == N


def test_streams_of_fp64_meet_weights_of_fp32() -> None:
    """As with compute_dtype=torch.float64, or torch's default dtype."""
    streams = torch.randn(B, S, N, M)
    connection = HyperConnection(M, N)
    for read in (lambda x: connection.read(x)[0], StreamHead(M, N).collapse):
        want, got = read(streams), read(streams.double())
        assert got.dtype == torch.float64
        torch.testing.assert_close(got.float(), want)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_mixing_is_doubly_stochastic(spread: float) -> None:
    comb = sinkhorn(spread * torch.randn(50, N, N), 20, 1e-6)
    assert bool((comb >= 0).all())
    torch.testing.assert_close(comb.sum(-2), torch.ones(50, N), rtol=0, atol=1e-4)
    slack = 1e-4 if spread < 5 else 0.05  # far from uniform, rows converge slowly
    torch.testing.assert_close(comb.sum(-1), torch.ones(50, N), rtol=0, atol=slack)


@pytest.mark.slow
def test_compiled_sinkhorn_has_finite_gradients() -> None:
    """Logits as far apart as FP32's exponential allows, where a fused backward has been seen to overflow."""
    logits = (40 * torch.randn(64, N, N)).requires_grad_()
    weights = torch.randn(64, N, N)
    (plain,) = torch.autograd.grad((weights * sinkhorn(logits, 20, 1e-6)).sum(), logits)
    fused = torch.compile(inspect.unwrap(sinkhorn))
    (compiled,) = torch.autograd.grad((weights * fused(logits, 20, 1e-6)).sum(), logits)
    assert bool(compiled.isfinite().all())
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)


def test_head_starts_as_the_mean() -> None:
    streams = torch.randn(B, S, N, M)
    torch.testing.assert_close(StreamHead(M, N).collapse(streams), streams.mean(-2), rtol=1e-5, atol=1e-6)


# --- whole models

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


V4_EXACT = ("hc_", "gate.", "norm", "attn_sink", "compressor.", "weights_proj")


@pytest.mark.parametrize(("parts", "exact"), [(V4_MODEL, V4_EXACT), (ENGRAM, ("gate.", "norm", "conv"))], ids=len)
def test_bf16_leaves_what_weighs_in_fp32_and_trains(parts: dict[str, Any], exact: tuple[str, ...]) -> None:
    model = Transformer(ModelConfig(**SMALL | parts)).bfloat16()
    for name, p in model.named_parameters():
        assert (p.dtype == torch.float32) == any(part in name for part in exact), name
    in_fp32 = parts is V4_MODEL  # the head's product, as in DeepSeek's code
    assert model(TOKENS).dtype == (torch.float32 if in_fp32 else torch.bfloat16)
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
