"""DeepSeek's inference layout, written as its convert.py does: a folder's names become its own, then ranks cut."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import MODELS

NAMES: dict[str, tuple[str, int | None]] = {
    **{"embed_tokens": ("embed", 0), "lm_head": ("head", 0), "norm": ("norm", None)},
    **{"input_layernorm": ("attn_norm", None), "post_attention_layernorm": ("ffn_norm", None)},
    **{"q_proj": ("wq", 0), "q_a_proj": ("wq_a", None), "q_a_layernorm": ("q_norm", None), "q_b_proj": ("wq_b", 0)},
    **{"kv_a_proj_with_mqa": ("wkv_a", None), "kv_a_layernorm": ("kv_norm", None), "kv_b_proj": ("wkv_b", 0)},
    **{"o_proj": ("wo", 1), "gate": ("gate", None)},
    **{"gate_proj": ("w1", 0), "down_proj": ("w2", 1), "up_proj": ("w3", 0)},
}
"""The layout's name of each module of a folder, and the dimension that is divided over the ranks."""
INFERENCE = MODELS["inference"]
BUILT = INFERENCE | {"n_mtp_layers": 0, "max_seq_len": 16384, "original_seq_len": 4096, "norm_eps": 1e-6}
"""The model of a JSON file of DeepSeek's inference code with the sizes of INFERENCE."""
INDEX = {"index_n_heads": 3, "index_head_dim": 128, "index_topk": 7}


def inference_layout(
    folder: Path, tensors: Mapping[str, Tensor], config: dict[str, Any], ranks: int, name: str
) -> Path:
    """Write a folder without multi-token prediction as DeepSeek's convert.py does."""
    folder.mkdir()
    files: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for theirs, tensor in tensors.items():
        path = theirs.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
        path = path.replace("weight_scale_inv", "scale").replace("e_score_correction_bias", "bias")
        stem, module, kind = f".{path}".rsplit(".", 2)
        own, dim = (module, None) if ".indexer." in path else NAMES[module]
        path = f"{stem}.{own}.{kind}"[1:]
        if ".experts." in path:
            expert = int(path.split(".experts.")[1].split(".")[0])
            files[expert // (config["n_routed_experts"] // ranks)][path] = tensor.contiguous()
            continue
        for rank, file in enumerate(files):
            file[path] = (tensor if dim is None else tensor.chunk(ranks, dim)[rank]).contiguous().clone()
    (folder / "tokenizer.json").write_text("{}")
    return _written(folder, files, config, name)


def _written(folder: Path, files: list[dict[str, Tensor]], config: dict[str, Any], name: str) -> Path:
    for rank, file in enumerate(files):
        save_file(file, folder / f"model{rank}-mp{len(files)}.safetensors")
    (folder / name).write_text(json.dumps(config))
    return folder


def cut_ranks(folder: Path, tensors: Mapping[str, Tensor], config: dict[str, Any], ranks: int) -> Path:
    """Write a folder of V4 as its convert.py does: the released names, some tensors cut over the ranks."""
    folder.mkdir()
    files: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    cut = {**dict.fromkeys(("embed", "head", "wq_b", "weights_proj", "wo_a"), 0), "wo_b": 1}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "experts" in parts:
            files[int(parts[parts.index("experts") + 1]) // (config["n_routed_experts"] // ranks)][name] = tensor
            continue
        dim = 0 if parts[-1] == "attn_sink" else cut.get(parts[-2] if len(parts) > 1 else "")
        for rank, file in enumerate(files):
            chunk = tensor if dim is None else tensor.view(tensor.dtype).tensor_split(ranks, dim)[rank]
            file[name] = chunk.contiguous().clone()
    return _written(folder, files, config, "config.json")
