"""Whole models next to transformers' DeepSeek-V4: table and scores, clamps, streams, each attention, choices."""

from typing import Any

import hf
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsmini import ModelConfig, Transformer
from dsmini.nn import compressed_attention
from tests.helpers.tolerances import relative_error

v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

OURS: dict[str, Any] = {
    **{"dim": 40, "n_heads": 6, "head_dim": 24, "qk_rope_head_dim": 10, "q_lora_rank": 28, "window_size": 9},
    **{"o_groups": 3, "o_lora_rank": 5, "index_n_heads": 13, "index_head_dim": 16, "index_topk": 3},
    **{"norm_eps": 1e-2, "max_seq_len": 256, "rope_theta": 100.0, "compress_rope_theta": 1600.0},
    **{"attention": "compressed", "n_layers": 4, "n_dense_layers": 0, "compress_ratios": (0, 4, 7, 4)},
    **{"vocab_size": 61, "moe_inter_dim": 13, "n_routed_experts": 9, "n_activated_experts": 3, "n_mtp_layers": 0},
    **{"n_expert_groups": 1, "n_limited_groups": 1, "n_hash_layers": 2, "score_func": "sqrtsoftplus"},
    **{"route_scale": 1.5, "swiglu_limit": 0.7, "hc_mult": 4, "hc_sinkhorn_iters": 3, "hc_eps": 1e-2},
}
YARN: dict[str, Any] = {"original_seq_len": 64, "rope_factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0}
RENAMED = {
    **{"wq_a": "q_a_proj", "q_norm": "q_a_norm", "wq_b": "q_b_proj", "wkv": "kv_proj", "wo_a": "o_a_proj"},
    **{"wo_b": "o_b_proj", "attn_sink": "sinks", "ape": "position_bias", "wgate": "gate_proj", "norm": "kv_norm"},
    **{"weights_proj": "scorer.weights_proj", "indexer": "compressor.indexer"},
}
"""Parts of an attention's names."""
KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 7: "heavily_compressed_attention"}


def theirs(yarn: bool) -> Any:
    kinds = [KINDS[m] for m in OURS["compress_ratios"]]
    mlps, rates = ["hash_moe"] * 2 + ["moe"] * 2, {KINDS[m]: m for m in (4, 7)}
    config = hf.v4_config(OURS, yarn, layer_types=kinds, mlp_layer_types=mlps, compress_rates=rates)
    model = v4.DeepseekV4ForCausalLM(config).eval()
    hf.randomise_v4(model)
    return model


def their_name(name: str) -> str:
    """Return transformers' name of a parameter of an attention."""
    *path, last = name.split(".")
    parts = [RENAMED.get(part, part) for part in (*path, last)]
    if path[:1] == ["indexer"]:  # its compressor's parts are the indexer's own
        parts = [part for i, part in enumerate(parts) if not (part == "compressor" and i)]
    return ".".join(parts)


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


def chosen_sets(indices: Tensor) -> list[set[int]]:
    """Return the entries that each query chose."""
    return [set(row) - {-1} for row in indices.flatten(0, 1).tolist()]


@pytest.mark.parametrize("yarn", [False, True])
def test_logits_choices_and_gradients(monkeypatch: pytest.MonkeyPatch, yarn: bool) -> None:
    """At lengths around window and blocks; gradients of all that learns from the output at the longest.

    Queries come in blocks of 16, the last of which is ragged. The eps of the streams is large, to show its place.
    """
    choices: tuple[list[Tensor], list[Tensor]] = [], []
    topk_keys = compressed_attention.topk_keys
    monkeypatch.setattr(compressed_attention, "BLOCK", 16)
    monkeypatch.setattr(
        compressed_attention, "topk_keys", lambda *args: (choices[0].append(topk_keys(*args)), choices[0][-1])[1]
    )
    other = theirs(yarn)
    for layer in (1, 3):
        indexer = other.model.layers[layer].self_attn.compressor.indexer
        indexer.register_forward_hook(lambda *args: choices[1].append(args[2]))
    mine = Transformer(ModelConfig(**OURS | (YARN if yarn else {}))).eval()
    given = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    mine.load_state_dict({name: of_theirs(name, given).detach() for name in mine.state_dict()})
    tokens = torch.randint(61, (2, 70))
    for s in (1, 3, 4, 8, 9, 10, 16, 35, 70):
        got, want = mine(tokens[:, :s]), other(tokens[:, :s]).logits
        assert relative_error(got, want) < 1e-5, s
    blocks = [F.pad(part, (0, 3 - part.shape[2]), value=-1) for part in choices[0][-10:]]  # five of each layer
    for mine_of_layer, theirs_of_layer in zip((blocks[:5], blocks[5:]), choices[1][-2:], strict=True):
        assert chosen_sets(torch.cat(mine_of_layer, 1)) == chosen_sets(theirs_of_layer)
    direction = torch.randn_like(want)
    (got * direction).sum().backward()
    (want * direction).sum().backward()
    grads = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    learned = [(name, p) for name, p in mine.named_parameters() if ".indexer." not in name]
    assert len(learned) > 100
    for name, p in learned:
        assert p.grad is not None, name
        assert relative_error(p.grad, of_theirs(name, grads)) < 3e-5, name
