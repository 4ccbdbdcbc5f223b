"""Sizes of a model as quantities: the inputs that formulas of a plan begin with."""

import dataclasses
import re
from dataclasses import dataclass

from dsmini.config import ModelConfig
from dsmini.console.commandline import field_docstrings
from dsmini.planner.quantities.quantity import COUNT, Count


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInputs:
    """Sizes of a model under ModelConfig's names, each an input with its source."""

    config: ModelConfig
    """The config itself, for choices that are no numbers, such as `attention`."""
    vocab_size: Count
    dim: Count
    inter_dim: Count
    moe_inter_dim: Count
    n_layers: Count
    n_dense_layers: Count
    n_heads: Count
    n_kv_heads: Count
    q_lora_rank: Count
    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: Count
    v_head_dim: Count
    index_n_heads: Count
    index_head_dim: Count
    index_topk: Count
    n_routed_experts: Count
    n_shared_experts: Count
    n_activated_experts: Count
    n_expert_groups: Count
    n_limited_groups: Count
    n_mtp_layers: Count

    @classmethod
    def of(cls, config: ModelConfig, source: str) -> "ModelInputs":
        """Return the inputs of a config.

        Args:
            source: where the config came from, such as "configs/deepseek-v3.toml".
        """
        titles = field_docstrings(ModelConfig)

        def size(name: str) -> Count:
            value = config.kv_heads if name == "n_kv_heads" else getattr(config, name)
            return COUNT(value or 0, name, re.split(r"\.(?:\s|$)|;", titles[name])[0], source)

        names = [field.name for field in dataclasses.fields(cls) if field.name != "config"]
        return cls(config=config, **{name: size(name) for name in names})
