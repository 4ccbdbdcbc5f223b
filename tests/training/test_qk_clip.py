"""QK-clip scales all logits of a head by its factor, leaves other heads alone, and holds the threshold in training."""

import dataclasses
from typing import Any

import pytest
import torch
from einops import einsum
from torch import Tensor

from dsmini import ModelConfig, RunConfig, Transformer
from dsmini.nn import Context
from dsmini.training.qk_clip import clip_logits, largest_logits
from tests.conftest import SMALL
from tests.helpers.configs import DSA, V4_MODEL, refusal

CASES: dict[str, dict[str, Any]] = {
    "mla": {},
    "no query compression": {"q_lora_rank": None},
    "yarn": {"original_seq_len": 8, "rope_factor": 4.0},
    "dsa": DSA,
}


def model_of(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL | changes))
    for name, p in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(p, std=3 * p.shape[-1] ** -0.5)
    return model.eval()


def logits_of(layer: Any, x: Tensor) -> Tensor:
    """Return the scaled logits [h, s, t] of one sequence, from the layer's own projections."""
    cos_sin = Context(positions=torch.arange(x.shape[1])[None]).cos_sin(layer.rope)
    q = layer.queries(layer.query_latent(x), cos_sin)
    k, _ = layer.keys_and_values(*layer.latents(x, cos_sin))
    return (einsum(q, k, "b s h d, b t h d -> b h s t") * layer.scale)[0].detach()


@pytest.mark.parametrize("case", CASES)
def test_all_logits_of_a_head_scale_by_its_factor(case: str) -> None:
    model, tokens = model_of(**CASES[case]), torch.randint(61, (1, 32))
    with largest_logits(model) as most:
        model(tokens)
    assert set(most) == {"layers.0.attn", "layers.1.attn"}
    layer, x = model.layers[0].attn, torch.randn(1, 9, 24)
    before, largest = logits_of(layer, x), most["layers.0.attn"]
    seen = torch.ones(32, 32).tril().bool()
    embedded = model.layers[0].attn_norm(model.embedded(tokens))
    torch.testing.assert_close(largest, logits_of(layer, embedded)[:, seen].amax(1))
    threshold = float(largest.sort().values[1]) - 1e-4  # two heads of three are above it
    values = layer.wkv_b.weight.unflatten(0, (3, -1))[:, 6:].clone()
    clip_logits(model, {"layers.0.attn": largest}, threshold)
    g = (threshold / largest).clamp(max=1)
    assert sorted((g < 1).tolist()) == [False, True, True]
    torch.testing.assert_close(logits_of(layer, x), before * g[:, None, None], rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.wkv_b.weight.unflatten(0, (3, -1))[:, 6:], values), "values stay"
    with largest_logits(model) as after:
        model(tokens)
    assert float(after["layers.0.attn"].max()) == pytest.approx(threshold, rel=1e-4)


def test_the_largest_of_several_forwards_and_of_a_document_alone() -> None:
    model, tokens = model_of(n_mtp_layers=0), torch.randint(61, (2, 32))
    every: list[Tensor] = []
    for part in tokens.split(1):
        with largest_logits(model) as most:
            model(part)
        every.append(most["layers.1.attn"])
    with largest_logits(model) as both:
        model(tokens[:1])
        model(tokens[1:])
    torch.testing.assert_close(both["layers.1.attn"], torch.maximum(*every))
    documents = torch.arange(32)[None].expand(2, -1).contiguous()  # each token sees itself alone
    with largest_logits(model) as alone:
        model.states(tokens, documents=documents)
    layer, rows = model.layers[0], tokens.split(1)
    own = [logits_of(layer.attn, layer.attn_norm(model.embedded(row))).diagonal(dim1=1, dim2=2).amax(1) for row in rows]
    torch.testing.assert_close(alone["layers.0.attn"], torch.maximum(*own), rtol=1e-4, atol=1e-4)


def test_what_it_does_not_go_with_is_refused() -> None:
    run = RunConfig(train=dataclasses.replace(RunConfig().train, qk_clip=100.0))
    for model in (V4_MODEL, {"attention": "mha"}, {"qk_norm": True}):
        assert "train.qk_clip looks at" in refusal(dataclasses.replace, run, model=ModelConfig(**model))
    assert "train.qk_clip looks at" in refusal(
        dataclasses.replace, run, train=dataclasses.replace(run.train, compile=True)
    )
    assert "one process" in refusal(run.parallel.check, run.model, run.train, 2)
