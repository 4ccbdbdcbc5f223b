"""DeepSeek-V4's streams in whole models, MTP included: next to a second definition, and as they start."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsmini import FeedForward, ModelConfig, Transformer
from dsmini.nn import Context, Experts
from dsmini.nn.fp8 import hold_all_fp8
from dsmini.nn.layers import in_precision
from dsmini.numerics import swiglu
from tests.conftest import SMALL, randomise
from tests.helpers.configs import V4_MODEL
from tests.helpers.tolerances import E4M3_UNIT, relative_error

SIZES: dict[str, Any] = SMALL | V4_MODEL | {"hc_eps": 1e-12, "hc_sinkhorn_iters": 2, "hc_mult": 3, "n_mtp_layers": 2}
TOKENS = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(0))


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def sublayer(hc: Any, norm: Any, layer: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """Return B X + C F(A X) as the paper writes it: B from exp, its rows and columns divided twice; no eps."""
    n = hc.n
    mixes = rms(x.flatten(-2)) @ hc.fn.T
    a = (hc.scale[0] * mixes[..., :n] + hc.base[:n]).sigmoid()
    c = 2 * (hc.scale[1] * mixes[..., n : 2 * n] + hc.base[n : 2 * n]).sigmoid()
    m = (hc.scale[2] * mixes[..., 2 * n :] + hc.base[2 * n :]).exp().unflatten(-1, (n, n))
    for _ in range(2):
        m = m / m.sum(-1, keepdim=True)
        m = m / m.sum(-2, keepdim=True)
    y = layer(rms(torch.einsum("bsn,bsnm->bsm", a, x)) * norm.weight)
    y = y[0] if isinstance(y, tuple) else y
    return torch.einsum("bsjk,bsjm->bskm", m, x) + torch.einsum("bsk,bsm->bskm", c, y)


def block(b: Any, x: Tensor, context: Context) -> Tensor:
    x = sublayer(b.hc_attn, b.attn_norm, lambda read: b.attn(read, context), x)
    return sublayer(b.hc_ffn, b.ffn_norm, lambda read: b.ffn(read, context), x)


def logits(model: Any, module: Any, x: Tensor) -> Tensor:
    """Return the logits of streams, by the hc_head and norm of the model or of a depth of MTP."""
    head = module.hc_head
    weights = (head.scale * (rms(x.flatten(-2)) @ head.fn.T) + head.base).sigmoid()
    return rms(torch.einsum("bsn,bsnm->bsm", weights, x)) * module.norm.weight @ model.head.weight.T


def second_definition(model: Any, tokens: Tensor) -> list[Tensor]:
    """Return the logits of the next token, and of each depth of MTP."""
    embedding = model.embed.weight[tokens]
    x = embedding[:, :, None].repeat(1, 1, 3, 1)
    for layer in model.layers:
        x = block(layer, x, Context(positions=torch.arange(tokens.shape[1])[None], tokens=tokens))
    found = [logits(model, model, x)]
    for k, depth in enumerate(model.mtp, 1):
        n = tokens.shape[1] - k
        e = (rms(embedding[:, k:]) * depth.enorm.weight) @ depth.e_proj.weight.T
        x = e[:, :, None] + (rms(x[:, :n]) * depth.hnorm.weight) @ depth.h_proj.weight.T
        x = block(depth.block, x, Context(positions=torch.arange(n)[None], tokens=tokens[:, k:]))
        found.append(logits(model, depth, x))
    return found


@pytest.mark.parametrize("mtp_input", ["post_norm", "pre_norm"])
def test_streams_and_mtp_agree_with_a_second_definition(mtp_input: str) -> None:
    """MTP reads all streams as the last block left them, whatever mtp_input says."""
    model = randomise(Transformer(**SIZES, mtp_input=mtp_input)).double().eval()
    out = model.run(TOKENS, mtp=True)
    for got, want in zip((out.logits, *out.mtp_logits), second_definition(model, TOKENS), strict=True):
        assert relative_error(got, want) < 1e-8


def test_starts_as_the_model_without_streams() -> None:
    """With the same other weights the losses agree, MTP's too: its block then reads states before the norm."""
    plain = ModelConfig(**SMALL | V4_MODEL | {"hc_mult": 1, "mtp_input": "pre_norm"})
    one, four = Transformer(plain), Transformer(dataclasses.replace(plain, hc_mult=4))
    state = one.state_dict()
    for name in [name for name in state if name.endswith("eh_proj.weight")]:
        e, h = state.pop(name).chunk(2, 1)
        state |= {name.replace("eh_proj", "e_proj"): e, name.replace("eh_proj", "h_proj"): h}
    missing, unknown = four.load_state_dict(state, strict=False)
    assert not unknown and all("hc_" in name for name in missing)
    for got, want in zip(four.losses(TOKENS, TOKENS)[:3], one.losses(TOKENS, TOKENS)[:3], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_bf16_leaves_what_weighs_in_fp32_and_trains() -> None:
    model = Transformer(ModelConfig(**SMALL | V4_MODEL)).bfloat16()
    kept = ("hc_", "gate.", "norm", "attn_sink", "ape")
    for name, p in model.named_parameters():
        if any(part in name for part in kept) and "wgate" not in name:
            assert p.dtype == torch.float32, name
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


def test_gradients_of_clamped_numbers_are_zero() -> None:
    gate, up = (torch.tensor(values, requires_grad=True) for values in ([-9.0, 0.5, 9.0, 0.5], [0.5, -9.0, 0.5, 0.5]))
    swiglu(gate, up, 1.0).sum().backward()
    assert gate.grad is not None and up.grad is not None
    assert (gate.grad == 0).tolist() == [False, False, True, False]
    assert (up.grad == 0).tolist() == [False, True, False, False]
