"""A model that is small enough for the tests of what measures."""

from dsmini import ModelConfig

TINY = ModelConfig(
    dim=128,
    inter_dim=144,
    moe_inter_dim=64,
    n_layers=2,
    n_heads=2,
    q_lora_rank=64,
    kv_lora_rank=64,
    n_routed_experts=8,
    n_activated_experts=2,
    n_mtp_layers=0,
    max_seq_len=128,
)
