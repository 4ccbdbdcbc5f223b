"""Write our weights as a GGUF file for llama.cpp's deepseek2."""

from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor

from dsmini import ModelConfig, Transformer
from dsmini.nn import MLA, FeedForward, MoE

ARCHITECTURE = "deepseek2"


def write_gguf(model: Transformer, path: Path, kind: str = "BF16") -> None:
    """Write a model with MLA, compressed queries and V3's routing as a GGUF file without a tokenizer.

    Args:
        kind: type of the matrices, BF16, F32 or Q8_0. Norms and gates are FP32. Q8_0 needs rows of whole blocks of 32
            numbers; other matrices are BF16.
    """
    import gguf  # pyright: ignore[reportMissingImports]

    c = model.config
    assert c.attention == "mla" and c.q_lora_rank is not None and c.topk_method == "noaux_tc" and not c.extended
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    _describe(writer, c)
    matrix = gguf.GGMLQuantizationType[kind]

    def put(name: str, t: Tensor, exact: bool = False) -> None:
        type_ = gguf.GGMLQuantizationType.F32 if exact or t.dim() == 1 else matrix
        if kind == "Q8_0" and type_ == matrix and t.shape[-1] % 32:
            type_ = gguf.GGMLQuantizationType.BF16
        values = t.detach().float().cpu().contiguous().numpy()
        writer.add_tensor(name, gguf.quants.quantize(values, type_), raw_dtype=type_)

    put("token_embd.weight", model.embed.weight)
    put("output_norm.weight", model.norm.weight)
    put("output.weight", model.head.weight)
    for i, block in enumerate(model.layers):
        for name, t in _block(block):
            put(f"blk.{i}.{name}", t, exact="ffn_gate_inp" in name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(w: Any, c: ModelConfig) -> None:
    import gguf  # pyright: ignore[reportMissingImports]

    w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model("none")
    w.add_block_count(c.n_layers)
    w.add_context_length(c.max_seq_len)
    w.add_embedding_length(c.dim)
    w.add_layer_norm_rms_eps(c.norm_eps)
    w.add_rope_freq_base(c.rope_theta)
    w.add_rope_dimension_count(c.qk_rope_head_dim)
    w.add_head_count(c.n_heads)
    w.add_head_count_kv(1)  # all heads share the latent
    w.add_q_lora_rank(c.q_lora_rank)
    w.add_kv_lora_rank(c.kv_lora_rank)
    w.add_key_length(c.kv_lora_rank + c.qk_rope_head_dim)
    w.add_value_length(c.kv_lora_rank)
    w.add_key_length_mla(c.qk_head_dim)
    w.add_value_length_mla(c.v_head_dim)
    w.add_feed_forward_length(c.inter_dim)
    w.add_leading_dense_block_count(c.n_dense_layers)
    w.add_expert_feed_forward_length(c.moe_inter_dim)
    w.add_expert_count(c.n_routed_experts)
    w.add_expert_used_count(c.n_activated_experts)
    w.add_expert_shared_count(c.n_shared_experts)
    w.add_expert_weights_scale(c.route_scale)
    w.add_expert_weights_norm(c.norm_topk_prob)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    w.add_uint32(f"{ARCHITECTURE}.expert_group_count", c.n_expert_groups)
    w.add_uint32(f"{ARCHITECTURE}.expert_group_used_count", c.n_limited_groups)


def _block(block: Any) -> list[tuple[str, Tensor]]:
    a, f = block.attn, block.ffn
    assert isinstance(a, MLA) and a.wq_a is not None and a.q_norm is not None and a.wq_b is not None
    w_uk, w_uv = a.absorbed_halves(a.wkv_b.weight.dtype)
    tensors = [
        ("attn_norm.weight", block.attn_norm.weight),
        ("attn_q_a.weight", a.wq_a.weight),
        ("attn_q_a_norm.weight", a.q_norm.weight),
        ("attn_q_b.weight", a.wq_b.weight),
        ("attn_kv_a_mqa.weight", a.wkv_a.weight),
        ("attn_kv_a_norm.weight", a.kv_norm.weight),
        ("attn_k_b.weight", rearrange(w_uk, "h n c -> h c n")),
        ("attn_v_b.weight", rearrange(w_uv, "h c v -> h v c")),
        ("attn_output.weight", a.wo.weight),
        ("ffn_norm.weight", block.ffn_norm.weight),
    ]
    if isinstance(f, FeedForward):
        return tensors + _feed_forward(f, "")
    assert isinstance(f, MoE)
    tensors += [("ffn_gate_inp.weight", f.gate.weight), ("exp_probs_b.bias", f.gate.bias)]
    tensors += _feed_forward(f.experts, "_exps")
    return tensors + (_feed_forward(f.shared_experts, "_shexp") if f.shared_experts is not None else [])


def _feed_forward(f: Any, ending: str) -> list[tuple[str, Tensor]]:
    names = {"gate": f.w1, "down": f.w2, "up": f.w3}
    return [(f"ffn_{name}{ending}.weight", getattr(w, "weight", w)) for name, w in names.items()]
