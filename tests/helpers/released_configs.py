"""Contents of config.json of released models on Hugging Face, and the JSON of DeepSeek's inference code."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "config" / "released"


def released_json(name: str) -> dict[str, Any]:
    """Return a file of tests/config/released, such as "deepseek-v3" or "deepseek-v3.inference"."""
    return json.loads((FOLDER / f"{name}.json").read_text())


HF = {name: released_json(name) for name in ("deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "kimi-k2", "moonlight")}
HF_V3 = HF["deepseek-v3"]
INDEXER = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
HF_V32 = HF_V3 | INDEXER | {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
HF_GLM = released_json("glm-5.2")
"""GLM-5.2, written from its published sizes; theta is said twice, and the one inside rope_parameters counts."""
