"""Compressed attention next to that of transformers' DeepSeek-V4: outputs, chosen entries and gradients."""

from typing import Any

import hf
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsmini import ModelConfig
from dsmini.nn import CompressedAttention, compressed_attention
from tests.helpers.tolerances import relative_error

v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

KINDS = {"window": (0, "sliding_attention"), "csa": (4, "compressed_sparse_attention")}
KINDS |= {"hca": (8, "heavily_compressed_attention"), "hca of odd blocks": (7, "heavily_compressed_attention")}
SIZES: dict[str, Any] = {
    **{"dim": 40, "n_heads": 6, "head_dim": 24, "qk_rope_head_dim": 10, "q_lora_rank": 28, "window_size": 9},
    **{"o_groups": 3, "o_lora_rank": 5, "index_n_heads": 13, "index_head_dim": 16, "index_topk": 3},
    **{"norm_eps": 1e-5, "max_seq_len": 256, "rope_theta": 100.0, "compress_rope_theta": 1600.0},
}
YARN: dict[str, Any] = {"original_seq_len": 64, "rope_factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0}
RENAMED = {
    **{"wq_a": "q_a_proj", "q_norm": "q_a_norm", "wq_b": "q_b_proj", "wkv": "kv_proj", "wo_a": "o_a_proj"},
    **{"wo_b": "o_b_proj", "attn_sink": "sinks", "ape": "position_bias", "wgate": "gate_proj", "norm": "kv_norm"},
    **{"weights_proj": "scorer.weights_proj", "indexer": "compressor.indexer"},
}


def theirs(kind: str, yarn: bool) -> Any:
    m, name = KINDS[kind]
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": m}
    config = hf.v4_config(SIZES | {"n_layers": 1}, yarn, layer_types=[name], compress_rates=rates)
    layer = v4.DeepseekV4Attention(config, 0)
    hf.randomise_v4(layer)
    return layer, config


def run_theirs(layer: Any, config: Any, x: Tensor) -> Tensor:
    s, positions = x.shape[1], torch.arange(x.shape[1])[None]
    rotary = v4.DeepseekV4RotaryEmbedding(config)
    tables = {kind: rotary(x, position_ids=positions, layer_type=kind) for kind in ("main", "compress")}
    distance = positions[0, :, None] - positions[0]
    hidden = (distance < 0) | (distance >= SIZES["window_size"])
    mask = torch.zeros(len(x), 1, s, s).masked_fill(hidden, torch.finfo(torch.float32).min)
    return layer(x, position_embeddings=tables, position_ids=positions, attention_mask=mask)[0]


def their_name(name: str) -> str:
    *path, last = name.split(".")
    parts = [RENAMED.get(part, part) for part in (*path, last)]
    if path[:1] == ["indexer"]:  # its compressor's parts are the indexer's own
        parts = [part for i, part in enumerate(parts) if not (part == "compressor" and i)]
    return ".".join(parts)


def ours(kind: str, yarn: bool, layer: Any) -> CompressedAttention:
    m, _ = KINDS[kind]
    changes = SIZES | (YARN if yarn else {}) | {"attention": "compressed", "n_layers": 1, "compress_ratios": (m,)}
    built = CompressedAttention(ModelConfig(**changes), compress_ratio=m)
    given = dict(layer.named_parameters())
    names = {name: their_name(name) for name, _ in built.named_parameters()}
    assert sorted(names.values()) == sorted(given)
    built.load_state_dict({name: given[other].detach() for name, other in names.items()})
    return built


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list that gets the chosen entries of each block of queries."""
    seen: list[Tensor] = []
    real = compressed_attention.topk_keys
    monkeypatch.setattr(compressed_attention, "topk_keys", lambda *args: (seen.append(real(*args)), seen[-1])[1])
    return seen


@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_choices_and_gradients(
    chosen: list[Tensor], monkeypatch: pytest.MonkeyPatch, kind: str, yarn: bool
) -> None:
    """At all lengths around window and blocks; queries come in blocks of 16, the last ragged."""
    monkeypatch.setattr(compressed_attention, "BLOCK", 16)
    other, config = theirs(kind, yarn)
    mine, their_chosen = ours(kind, yarn, other), []
    if kind == "csa":
        other.compressor.indexer.register_forward_hook(lambda *args: their_chosen.append(args[2]))
    x = torch.randn(2, 61, SIZES["dim"])
    for s in (1, 2, 3, 4, 5, 7, 8, 9, 10, 14, 15, 16, 17, 31, 32, 33, 61):
        got, want = mine(x[:, :s]), run_theirs(other, config, x[:, :s])
        assert relative_error(got, want) < 1e-5, s
    if kind == "csa":
        last = torch.cat([F.pad(part, (0, 3 - part.shape[2]), value=-1) for part in chosen[-4:]], 1)
        for a, b in zip(last.flatten(0, 1).tolist(), their_chosen[-1].flatten(0, 1).tolist(), strict=True):
            assert set(a) - {-1} == set(b) - {-1}
    direction = torch.randn_like(want)
    (got * direction).sum().backward()
    (want * direction).sum().backward()
    given = dict(other.named_parameters())
    for name, p in mine.named_parameters():
        grad = given[their_name(name)].grad
        assert (p.grad is None) == (grad is None) == ("indexer" in name), name
        assert p.grad is None or relative_error(p.grad, grad) < 1e-5, name
