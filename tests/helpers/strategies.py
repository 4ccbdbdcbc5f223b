"""Random valid configs for hypothesis."""

from typing import Any

from hypothesis import strategies as st

from dsmini import ModelConfig


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    """Draw a valid ModelConfig of small, mostly odd sizes: each attention, dense and MoE layers, groups, MTP, YaRN."""

    def size(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    attention = draw(st.sampled_from(["mla", "dsa", "mha", "gqa", "mqa"]))
    n_kv_heads = size(1, 3) if attention == "gqa" else None
    n_heads = size(1, 3) * (n_kv_heads or 1)
    topk_method = draw(st.sampled_from(["noaux_tc", "group_limited_greedy", "greedy"]))
    groups = 1 if topk_method == "greedy" else size(1, 3)
    in_group = size(2, 5)
    limited = size(1, groups)
    n_layers, n_mtp_layers = size(1, 3), size(0, 2)
    slow, fast = sorted((draw(st.floats(0.5, 64)), draw(st.floats(0.5, 64))))
    values: dict[str, Any] = {
        **{name: size(1, 40) for name in ("vocab_size", "dim", "inter_dim")},
        **{name: size(1, 20) for name in ("moe_inter_dim", "kv_lora_rank", "v_head_dim")},
        "n_layers": n_layers,
        "n_dense_layers": size(0, n_layers + n_mtp_layers),
        "n_heads": n_heads,
        "attention": attention,
        "n_kv_heads": n_kv_heads,
        "q_lora_rank": draw(st.none() | st.integers(1, 20)),
        "qk_nope_head_dim": size(1, 15) * (1 if attention in ("mla", "dsa") else 2),
        "qk_rope_head_dim": 2 * size(1, 8),
        "n_routed_experts": groups * in_group,
        "n_shared_experts": size(0, 3),
        "n_activated_experts": size(1, limited * in_group),
        "n_expert_groups": groups,
        "n_limited_groups": limited,
        "score_func": draw(st.sampled_from(["sigmoid", "softmax"])),
        "topk_method": topk_method,
        "route_scale": draw(st.floats(0.1, 20)),
        "n_mtp_layers": n_mtp_layers,
        "mtp_input": draw(st.sampled_from(["post_norm", "pre_norm"])),
        "max_seq_len": size(3, 99),
        "original_seq_len": draw(st.none() | st.integers(1, 99)),
        "rope_theta": draw(st.floats(2, 1e6)),
        "rope_factor": draw(st.floats(1, 64)),
        "beta_fast": fast,
        "beta_slow": slow,
        **{name: draw(st.floats(0, 2)) for name in ("mscale", "mscale_all_dim")},
        "norm_eps": draw(st.floats(1e-12, 1e-3)),
        "init_std": draw(st.floats(1e-4, 1)),
        **{name: draw(st.booleans()) for name in ("norm_topk_prob", "zero_init", "embed_norm")},
        "qk_norm": attention != "dsa" and draw(st.booleans()),
    }
    if attention == "dsa":
        values |= {
            "index_n_heads": size(1, 4),
            "index_head_dim": draw(st.sampled_from([16, 32, 256])),
            "index_topk": size(1, 40),
            "indexer_rope_interleave": draw(st.booleans()),
            "indexer_fp8": draw(st.booleans()),
            "indexer_target": draw(st.sampled_from(["own", "served"])),
        }
        if draw(st.booleans()):
            later = st.lists(st.sampled_from(["full", "shared"]), min_size=n_layers - 1, max_size=n_layers - 1)
            values["indexer_types"] = ("full", *draw(later))
    return ModelConfig(**values)
