"""Bytes that are held, counted from the config, against storages of models and optimizers that are built."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings

from dsmini import ModelConfig, TrainConfig, Transformer, ops
from dsmini.accounting import gradient_bytes, optimizer_bytes, training_bytes, weight_bytes
from dsmini.nn.fp8 import hold_all_fp8
from dsmini.training.optim import optimizer_state, optimizers
from tests.helpers.accounting import DTYPES, attention_by, fused
from tests.helpers.configs import DSA, released
from tests.helpers.strategies import model_configs


def bytes_of(model: Transformer) -> int:
    return sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()])


# --- weights


@settings(max_examples=30)
@given(config=model_configs())
def test_bytes_of_weights_are_those_of_a_model(config: ModelConfig) -> None:
    model = Transformer(config)
    assert weight_bytes(config, "float32").total == bytes_of(model)
    assert weight_bytes(config, "bfloat16").total == bytes_of(model.to(torch.bfloat16))
    assert weight_bytes(config, "fp8").total == bytes_of(hold_all_fp8(model.eval()))


@pytest.mark.parametrize("config", [ModelConfig(dim=192, kv_lora_rank=130, moe_inter_dim=129), released("fp8")])
def test_bytes_of_weights_with_ragged_blocks(config: ModelConfig) -> None:
    model = hold_all_fp8(Transformer(config).to(torch.bfloat16).eval())
    counted = weight_bytes(config, "fp8")
    assert counted.total == bytes_of(model)
    scales = {name: buffer for name, buffer in model.named_buffers() if name.endswith("scale")}
    assert counted.by_part["scales"] == sum(scale.nbytes for scale in scales.values())


def test_bytes_of_v3_by_hand() -> None:
    """V3's codes are one byte; what is never FP8 is two, or four."""
    v3 = released("deepseek-v3", n_mtp_layers=0)
    ends, gates, norms = 2 * 129280 * 7168, 58 * 256 * 7168, 61 * (2 * 7168 + 1536 + 512) + 7168
    codes = 671_026_404_352 - ends - gates - norms
    attention = 12 * 56 + 192 * 12 + 5 * 56 + 256 * 4 + 56 * 128  # blocks of a layer: facts of the released folder
    scales = 61 * attention + 3 * 3 * 144 * 56 + 58 * 257 * 3 * 16 * 56
    counted = weight_bytes(v3, "fp8")
    assert counted.by_part["scales"] == 4 * scales
    assert counted.total == codes + 4 * scales + 2 * ends + 4 * (gates + norms + 14_848)
    assert weight_bytes(v3, "float32").total == 4 * (671_026_404_352 + 14_848)


# --- gradients and optimizers


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("attention", ["mla", "gqa", "dsa"])
def test_bytes_of_the_optimizer_are_those_it_remembers(
    small_config: Any, optimizer: Any, moments: Any, attention: str
) -> None:
    config = small_config(**{"gqa": {"attention": "gqa", "n_kv_heads": 1}, "dsa": DSA}.get(attention, {}))
    model = Transformer(config)
    tokens = torch.randint(0, config.vocab_size, (2, 20))
    model.losses(tokens, tokens).total.backward()
    for parameter in model.parameters():  # an expert may have no visitor, and then no gradient
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    used = optimizers(model, TrainConfig(optimizer=optimizer, moments=moments))
    for one in used:
        one.step()
    state = optimizer_state(used, model.named_parameters())
    assert optimizer_bytes(config, optimizer, moments).total == sum(t.nbytes for t in state.values())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradient_bytes(config).total == sum(g.nbytes for g in grads)


# --- all that training holds


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("precision", ["native", "fp8"])
def test_all_that_training_keeps(precision: Any, dtype: Any) -> None:
    """Count every storage that is not a parameter's: copies of weights and the head's gradient too."""
    config = ModelConfig(n_layers=2, v_head_dim=48, precision=precision)
    model, held = Transformer(config, compute_dtype=DTYPES[dtype]), dict[int, torch.Tensor]()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tokens = torch.randint(0, 256, (2, 64))

    def pack(t: torch.Tensor) -> torch.Tensor:
        t = t.detach()  # a graph that is held from within itself is never freed
        if (pointer := t.untyped_storage().data_ptr()) not in own:
            held[pointer] = t
        return t

    with ops.use("eager"), attention_by(fused), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.losses(tokens, tokens)
    sizes = sum(t.untyped_storage().nbytes() for t in held.values())
    counted = training_bytes(config, batch_size=2, seq_len=64, dtype=dtype).by_part
    kept = counted["activations"] + counted.get("weights kept for backward", 0) + counted["the head's gradient"]
    assert kept == pytest.approx(sizes, rel=1e-3)


def test_training_state_of_v3_by_parameter() -> None:
    """FP32 parameter, gradient and two moments 16 bytes, with BF16 moments 12 (report, section 3.3.3); Muon 12."""
    v3 = released("deepseek-v3")
    sizes: dict[str, Any] = {"batch_size": 1, "seq_len": 64}

    def state(**how: Any) -> float:
        by_part = training_bytes(v3, **sizes, **how).by_part
        return sum(by_part[name] for name in ("parameters", "gradients", "optimizer")) / (671.026e9 + 11.61e9)

    assert state() == pytest.approx(16, rel=1e-4)
    assert state(moments="bfloat16") == pytest.approx(12, rel=1e-4)
    assert state(optimizer="muon") == pytest.approx(12, rel=2e-3)
