"""Whole models next to transformers' DeepSeek-V4: table and scores, clamps, streams, and attention of each kind."""

from typing import Any

import hf
import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer
from tests.helpers.tolerances import relative_error
from tests.oracle.test_compressed_attention import SIZES as ATTENTION
from tests.oracle.test_compressed_attention import YARN, their_name

v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

OURS: dict[str, Any] = ATTENTION | {
    **{"attention": "compressed", "n_layers": 4, "n_dense_layers": 0, "compress_ratios": (0, 4, 7, 4)},
    **{"vocab_size": 61, "moe_inter_dim": 13, "n_routed_experts": 9, "n_activated_experts": 3, "n_mtp_layers": 0},
    **{"n_expert_groups": 1, "n_limited_groups": 1, "n_hash_layers": 2, "score_func": "sqrtsoftplus"},
    **{"route_scale": 1.5, "swiglu_limit": 0.7, "hc_mult": 4, "hc_sinkhorn_iters": 3, "hc_eps": 1e-3},
}
KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 7: "heavily_compressed_attention"}


def theirs(yarn: bool) -> Any:
    kinds = [KINDS[m] for m in OURS["compress_ratios"]]
    mlps, rates = ["hash_moe"] * 2 + ["moe"] * 2, {KINDS[m]: m for m in (4, 7)}
    config = hf.v4_config(OURS, yarn, layer_types=kinds, mlp_layer_types=mlps, compress_rates=rates)
    model = v4.DeepseekV4ForCausalLM(config).eval()
    hf.randomise_v4(model)
    return model


def of_theirs(name: str, given: dict[str, Tensor]) -> Tensor:
    """Return the tensor of transformers' model that is ours of this name."""
    if not name.startswith("layers."):
        renamed = {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
        return given[renamed.get(name, "model." + name.replace("hc_head.", "hc_head.hc_"))]
    _, layer, part, *rest = name.split(".")
    path, last = f"model.layers.{layer}", ".".join(rest)
    if part == "attn":
        return given[f"{path}.self_attn.{their_name(last)}"]
    if part in ("hc_attn", "hc_ffn"):
        return given[f"{path}.{part.removeprefix('hc_')}_hc.{last}"]
    if part in ("attn_norm", "ffn_norm"):
        return given[f"{path}.{'input' if part == 'attn_norm' else 'post_attention'}_layernorm.{last}"]
    if last in ("experts.w1", "experts.w3"):
        return given[f"{path}.mlp.experts.gate_up_proj"].chunk(2, 1)[last == "experts.w3"]
    renamed = {"experts.w2": "experts.down_proj", "gate.bias": "gate.e_score_correction_bias"}
    for ours, other in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        renamed[f"shared_experts.{ours}.weight"] = f"shared_experts.{other}.weight"
    return given[f"{path}.mlp.{renamed.get(last, last)}"]


@pytest.mark.parametrize("yarn", [False, True])
def test_logits_and_gradients(yarn: bool) -> None:
    """At lengths around window and blocks; gradients of all that learns from the output at the longest."""
    other = theirs(yarn)
    mine = Transformer(ModelConfig(**OURS | (YARN if yarn else {}))).eval()
    given = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    mine.load_state_dict({name: of_theirs(name, given).detach() for name in mine.state_dict()})
    tokens = torch.randint(61, (2, 70))
    for s in (1, 3, 4, 8, 9, 10, 16, 35, 70):
        got, want = mine(tokens[:, :s]), other(tokens[:, :s]).logits
        assert relative_error(got, want) < 1e-5, s
    direction = torch.randn_like(want)
    (got * direction).sum().backward()
    (want * direction).sum().backward()
    grads = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    learned = [(name, p) for name, p in mine.named_parameters() if ".indexer." not in name]
    assert len(learned) > 100
    for name, p in learned:
        assert p.grad is not None, name
        assert relative_error(p.grad, of_theirs(name, grads)) < 3e-5, name
