"""Models to measure: one whose weights fit into no cache, a smaller one for --quick, and one to train."""

import dataclasses

from dsmini import ModelConfig

BIG = ModelConfig(
    vocab_size=32000,
    dim=1024,
    inter_dim=2816,
    moe_inter_dim=256,
    n_layers=8,
    n_dense_layers=1,
    n_heads=16,
    q_lora_rank=384,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=64,
    n_activated_experts=6,
    n_expert_groups=8,
    n_limited_groups=4,
    n_mtp_layers=0,
    max_seq_len=32768,
)
"""455M parameters, 103M of them active for a token: 910 and 206 MB in BF16."""

QUICK = dataclasses.replace(BIG, vocab_size=8192, n_layers=3, n_routed_experts=32)
"""85M parameters, 170 MB in BF16."""

WIDE = dataclasses.replace(BIG, n_heads=8, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
"""The same size with DeepSeek's own widths of heads and latent: 449M parameters."""

QUICK_WIDE = dataclasses.replace(WIDE, vocab_size=8192, n_layers=3, n_routed_experts=32)

TRAINED = ModelConfig(
    dim=256,
    inter_dim=704,
    moe_inter_dim=96,
    n_layers=6,
    n_dense_layers=1,
    n_heads=4,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_mtp_layers=0,
    max_seq_len=256,
)
"""7.6M parameters, as a laptop can train."""


def decoded(quick: bool) -> ModelConfig:
    """Return the model for decoding and prefill."""
    return QUICK if quick else BIG


def wide(quick: bool) -> ModelConfig:
    """Return the model whose heads and latent are as wide as DeepSeek's."""
    return QUICK_WIDE if quick else WIDE
