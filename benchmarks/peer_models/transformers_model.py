"""The same shapes elsewhere: transformers' DeepSeek-V3."""

from typing import Any

from dsmini import ModelConfig


def deepseek_v3(c: ModelConfig) -> Any:
    """transformers' DeepseekV3ForCausalLM of this shape, with random weights and SDPA attention."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            intermediate_size=c.inter_dim,
            moe_intermediate_size=c.moe_inter_dim,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_heads,
            n_shared_experts=c.n_shared_experts,
            n_routed_experts=c.n_routed_experts,
            num_experts_per_tok=c.n_activated_experts,
            n_group=c.n_expert_groups,
            topk_group=c.n_limited_groups,
            kv_lora_rank=c.kv_lora_rank,
            q_lora_rank=c.q_lora_rank,
            qk_nope_head_dim=c.qk_nope_head_dim,
            qk_rope_head_dim=c.qk_rope_head_dim,
            v_head_dim=c.v_head_dim,
            first_k_dense_replace=c.n_dense_layers,
            routed_scaling_factor=c.route_scale,
            max_position_embeddings=max(2048, c.max_seq_len),
            attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
        )
    )
