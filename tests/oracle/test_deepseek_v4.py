"""Whole models next to transformers' DeepSeek-V4: table and scores, clamps, streams, and attention of each kind."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer
from tests.helpers.tolerances import relative_error
from tests.oracle.test_compressed_attention import SIZES as ATTENTION
from tests.oracle.test_compressed_attention import YARN, their_name

v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
configuration = pytest.importorskip("transformers.models.deepseek_v4.configuration_deepseek_v4")

OURS: dict[str, Any] = ATTENTION | {
    **{"attention": "compressed", "n_layers": 4, "n_dense_layers": 0, "compress_ratios": (0, 4, 7, 4)},
    **{"vocab_size": 61, "moe_inter_dim": 13, "n_routed_experts": 9, "n_activated_experts": 3, "n_mtp_layers": 0},
    **{"n_expert_groups": 1, "n_limited_groups": 1, "n_hash_layers": 2, "score_func": "sqrtsoftplus"},
    **{"route_scale": 1.5, "swiglu_limit": 0.7, "hc_mult": 4, "hc_sinkhorn_iters": 3, "hc_eps": 1e-3},
}
KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 7: "heavily_compressed_attention"}


def theirs(yarn: bool) -> Any:
    """Return a random model of transformers, none of whose parts is zero."""
    same = ("head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "index_n_heads", "index_head_dim", "index_topk")
    same += ("qk_rope_head_dim", "compress_rope_theta", "rope_theta", "vocab_size", "swiglu_limit", "hc_mult")
    same += ("hc_sinkhorn_iters", "hc_eps")
    rope: dict[str, Any] = {"rope_type": "default"}
    if yarn:
        rope = {"rope_type": "yarn", "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0}
        rope |= {"original_max_position_embeddings": 64}
    config = configuration.DeepseekV4Config(
        **{name: OURS[name] for name in same},
        hidden_size=OURS["dim"],
        num_attention_heads=OURS["n_heads"],
        sliding_window=OURS["window_size"],
        num_hidden_layers=4,
        layer_types=[KINDS[m] for m in OURS["compress_ratios"]],
        mlp_layer_types=["hash_moe"] * 2 + ["moe"] * 2,
        compress_rates={KINDS[m]: m for m in (4, 7)},
        moe_intermediate_size=OURS["moe_inter_dim"],
        num_local_experts=OURS["n_routed_experts"],
        num_experts_per_tok=OURS["n_activated_experts"],
        routed_scaling_factor=OURS["route_scale"],
        rms_norm_eps=OURS["norm_eps"],
        max_position_embeddings=256,
        rope_parameters=rope,
        attn_implementation="eager",
        experts_implementation="eager",  # grouped products want even sizes
    )
    model = v4.DeepseekV4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                t.copy_(torch.rand(len(t), OURS["n_routed_experts"]).argsort(-1)[:, : t.shape[1]])
            elif name.endswith("e_score_correction_bias"):
                t.uniform_(-0.4, 0.1)
            elif "norm" in name:
                t.uniform_(0.5, 1.5)
            elif "inv_freq" not in name:
                free = t.dim() == 1 or "bias" in name or "embed" in name
                t.normal_(std=1.0 if free else t.shape[-1] ** -0.5)
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
